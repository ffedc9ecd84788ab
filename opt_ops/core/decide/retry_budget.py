"""What earlier incidents spent of the retry budgets, and where to roll back to."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.decide.policy import Playbook, Policy
from opt_ops.core.failures.classes import Spends, row
from opt_ops.core.state.checkpoints import KnownCheckpoint
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import at_hand, newest_good, reachable_checkpoints
from opt_ops.core.values import Action


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent before an incident.

    Attributes:
        actions: How many actions.
        exhausted: Whether a budget is spent.
        reason: For the journal.
    """

    actions: int
    exhausted: bool
    reason: str


def spent_before(state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy) -> Spent:
    """What earlier incidents spent of the playbook's budget and of that of all playbooks."""
    counted = [(other, step) for other, step in _counted(state, incident) if not other.replaces_ranks]
    earlier = [(other, step) for other, step in counted if other.kind == incident.kind]
    budget, limits, here = playbook.budget, policy.limits, incident.onset_step or failure_step(state, incident)
    recent = actions_spent(earlier, now, here, budget.hours, budget.refill_steps)
    spent = f"{recent} of {budget.actions} actions in {budget.hours:g} h spent before this one"
    if recent >= budget.actions:
        return Spent(recent, True, f"retry budget of {playbook.name}: {spent}")
    others = [(other, step) for other, step in counted if _spends_overall(other)]
    overall = actions_spent(others, now, here, limits.hours, limits.refill_steps)
    if overall >= limits.actions and _spends_overall(incident):
        most = f"{overall} of {limits.actions} actions in {limits.hours:g} h"
        return Spent(overall, True, f"retry budget of all playbooks: {most}")
    return Spent(recent, False, spent)


def tries_around(state: State, incident: Incident, playbook: Playbook) -> int:
    """How many rungs of the general ladder were tried around this step. Cures of one cause do not count."""
    return sum(not other.replaces_ranks for other in _tries(state, incident, playbook))


def tried_here(state: State, incident: Incident, playbook: Playbook) -> Incident | None:
    """An earlier try around this step at the same ranks or nodes; one that names neither was there, too."""
    nodes, ranks = set(incident.nodes), incident.lost_ranks
    for other in _tries(state, incident, playbook):
        there = other.lost_ranks.union(other.decision.ranks if other.decision else ())
        apart = ranks.isdisjoint(there) and nodes.isdisjoint(other.nodes)
        if not (apart and (nodes or ranks) and (there or other.nodes)):
            return other
    return None


def _tries(state: State, incident: Incident, playbook: Playbook) -> list[Incident]:
    here, cured_after = incident.onset_step or failure_step(state, incident), playbook.budget.settle_steps
    return [
        other
        for other, step in _counted(state, incident)
        if other.kind == incident.kind
        and (other.decision is not None and other.decision.cause is None)
        and (cured_after is not None and here <= step + cured_after)
    ]


def in_place_exhausted(state: State, incident: Incident, playbook: Playbook, now: float) -> str | None:
    """Why the playbook may replace no more ranks for now. Replacements that fell back to a restart count, too."""
    here, budget = incident.onset_step or failure_step(state, incident), playbook.in_place
    earlier = [
        (other, failure_step(state, other))
        for other in state.incidents.values()
        if other.kind == incident.kind
        and other.name != incident.name
        and (other.replaces_ranks or other.fell_back is not None)
        and spends_budget(other)
    ]
    spent = actions_spent(earlier, now, here, budget.hours, playbook.budget.refill_steps)
    if spent < budget.actions:
        return None
    return f"{spent} of {budget.actions} replacements of ranks in {budget.hours:g} h are spent"


def _counted(state: State, incident: Incident) -> list[tuple[Incident, int]]:
    return [
        (other, failure_step(state, other))
        for other in state.incidents.values()
        if other.name != incident.name and spends_budget(other)
    ]


def _spends_overall(incident: Incident) -> bool:
    return row(incident.kind).spends is Spends.OWN_AND_OVERALL


def spends_budget(earlier: Incident) -> bool:
    """Whether it spends a retry budget: training was touched, no drill did it, and no operator has answered it since.

    The exclusion of a spare touches no training.
    """
    touched = earlier.acted_on and earlier.decision is not None and earlier.decision.action is not Action.EXCLUDE
    return touched and earlier.drill is None and not earlier.answered


def failure_step(state: State, incident: Incident) -> int:
    """The step at which it failed. For a launch that made no step: the step from which it would have continued."""
    if incident.step_failed is not None:
        return incident.step_failed
    attempt = state.attempts.get(incident.attempt or "")
    return attempt.checkpoint.step if attempt is not None and attempt.checkpoint is not None else 0


def actions_spent(
    earlier: list[tuple[Incident, int]], now: float, here: int, hours: float, refill_steps: int | None
) -> int:
    """How many of them still count: within the last `hours`, and training has not come `refill_steps` past them."""
    return len(_still_counting(earlier, now, here, hours, refill_steps))


def _still_counting(
    earlier: list[tuple[Incident, int]], now: float, here: int, hours: float, refill_steps: int | None
) -> list[Incident]:
    return [
        other
        for other, step in earlier
        if now - other.opened_at <= hours * 3600 and (refill_steps is None or here <= step + refill_steps)
    ]


@dataclass(frozen=True, slots=True)
class BudgetLeft:
    """What is left of a retry budget that was spent from.

    Attributes:
        playbook: Its name; `all playbooks` for the budget that they share.
        kind: The failure class that spent it; empty for the shared one.
        left: How many actions are left.
        of: How many there are when nothing is spent.
        until: When the oldest action stops counting, in seconds since the epoch.
    """

    playbook: str
    kind: str
    left: int
    of: int
    until: float


def budgets_left(state: State, policy: Policy, now: float) -> list[BudgetLeft]:
    """Every retry budget from which actions still count, at the newest step; the one with the fewest left first."""
    counted = [
        (incident, failure_step(state, incident))
        for incident in state.incidents.values()
        if spends_budget(incident) and not incident.replaces_ranks
    ]
    here = (state.attempt.last_step or 0) if state.attempt else 0
    found: list[BudgetLeft] = []
    for kind in dict.fromkeys(incident.kind for incident, _ in counted):
        if (playbook := policy.playbooks.get(kind)) is not None:
            budget = playbook.budget
            of_kind = [item for item in counted if item[0].kind == kind]
            spent = _still_counting(of_kind, now, here, budget.hours, budget.refill_steps)
            found += _left(playbook.name, kind, budget.actions, budget.hours, spent)
    limits = policy.limits
    overall = [item for item in counted if _spends_overall(item[0])]
    spent = _still_counting(overall, now, here, limits.hours, limits.refill_steps)
    found += _left("all playbooks", "", limits.actions, limits.hours, spent)
    return sorted(found, key=lambda each: (each.left, each.playbook))


def _left(playbook: str, kind: str, of: int, hours: float, spent: list[Incident]) -> list[BudgetLeft]:
    if not spent:
        return []
    until = min(incident.opened_at for incident in spent) + hours * 3600
    return [BudgetLeft(playbook, kind, max(0, of - len(spent)), of, until)]


def rollback_point(state: State, run: str, onset: int, margin: int) -> tuple[KnownCheckpoint | None, str]:
    """Where to roll back to: (the checkpoint, why this one). None: from scratch, because none is before the onset."""
    if far := newest_good(state, run, onset - margin):
        return far, f"newest verified healthy checkpoint at least {margin} steps before the onset at {onset}"
    before = [
        known
        for known in reachable_checkpoints(state, run)
        if known.good and known.checkpoint.step < onset and at_hand(state, known.checkpoint)
    ]
    if before:
        oldest = min(before, key=lambda known: known.checkpoint.step)
        return oldest, f"none is {margin} steps before the onset at {onset}: the oldest verified healthy one"
    return None, f"no verified healthy checkpoint before the onset at {onset}: from scratch"
