"""Which rung of a playbook's ladder an incident gets, whether there is budget for it, and where to roll back to."""

from __future__ import annotations

from opt_ops.core.decide.policy import Playbook, Policy, Rung
from opt_ops.core.failures.classes import Spends, row
from opt_ops.core.state.model import Incident, KnownCheckpoint, State
from opt_ops.core.state.queries import at_hand, newest_good, reachable_checkpoints
from opt_ops.core.values import Action


def choose_rung(
    state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy
) -> tuple[int, Rung | None, str]:
    """Which rung of the ladder an incident gets: (its number, the rung or None when a human is needed, why)."""
    counted = [
        (other, _place(state, other))
        for other in state.incidents.values()
        if other.name != incident.name and _counts(other)
    ]
    earlier = [(other, step) for other, step in counted if other.kind == incident.kind]
    budget, limits, here = playbook.budget, policy.limits, incident.onset_step or _place(state, incident)
    recent = _spent(earlier, now, here, budget.hours, budget.refill_steps)
    spent = f"{recent} of {budget.actions} actions in {budget.hours:g} h spent before this one"
    if recent >= budget.actions:
        return recent, None, f"budget of {playbook.name}: {spent}"
    others = [(other, step) for other, step in counted if _spends_overall(other)]
    overall = _spent(others, now, here, limits.hours, limits.refill_steps)
    if overall >= limits.actions and _spends_overall(incident):
        return overall, None, f"budget of all playbooks: {overall} of {limits.actions} actions in {limits.hours:g} h"
    settle = budget.settle_steps
    number = sum(settle is not None and here <= step + settle for _, step in earlier)
    if number >= len(playbook.ladder):
        return (
            number,
            None,
            f"the ladder of {playbook.name} is used up: {number} tries around this step did not cure it",
        )
    return number, playbook.ladder[number], spent


def _spends_overall(incident: Incident) -> bool:
    return row(incident.kind).spends is Spends.OWN_AND_OVERALL


def _counts(earlier: Incident) -> bool:
    """Whether training was touched, by no drill, and nobody has answered it since. Taking out a spare touches none."""
    touched = earlier.acted_on and earlier.decision is not None and earlier.decision.action is not Action.EXCLUDE
    return touched and earlier.drill is None and not earlier.answered


def _place(state: State, incident: Incident) -> int:
    """The step at which it failed; of a launch that made none, the one where it would have gone on."""
    if incident.step_failed is not None:
        return incident.step_failed
    attempt = state.attempts.get(incident.attempt or "")
    return attempt.checkpoint.step if attempt is not None and attempt.checkpoint is not None else 0


def _spent(earlier: list[tuple[Incident, int]], now: float, here: int, hours: float, refill_steps: int | None) -> int:
    """How many of them still count: young enough, and not yet made good by new progress."""
    return sum(
        now - other.opened_at <= hours * 3600 and (refill_steps is None or here <= step + refill_steps)
        for other, step in earlier
    )


def rollback_point(state: State, run: str, onset: int, margin: int) -> tuple[KnownCheckpoint | None, str]:
    """Where to roll back to: (the checkpoint, why this one). None: from scratch, for want of any before the onset."""
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
