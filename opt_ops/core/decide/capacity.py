"""Nodes: which are fit, how many are missing, on how many to train, and what to give back.

The first allocation holds the nodes and their spares; later ones replace what was lost, or succeed one whose time limit
nears. An attempt may use nodes of several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import takewhile

from opt_ops.core.decide.ends import awaits_verdict
from opt_ops.core.decide.policy import SCRATCH_STEPS, Policy
from opt_ops.core.events import (
    AllocationIntended,
    AttemptIntended,
    Event,
    LineageHalted,
    ReleaseIntended,
    SizeDecided,
)
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.health.burn_in_findings import BURNING_IN
from opt_ops.core.memo import memoize_recent
from opt_ops.core.names import attempt_name
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import Allocation, Node, State
from opt_ops.core.state.queries import (
    held_back,
    newest_good,
    open_proposals,
    probing,
    under_examination,
    waiting_for_attempt,
)
from opt_ops.core.values import Driver, Parent, Verdict
from opt_ops.core.waiting import SKEW_SECONDS, Backoff, still_waiting

# Between two requests, whatever came of the first: a node that is lost at once is not asked for at once.
_REQUEST_SPACING_SECONDS = 10.0

_PART = 0.25  # of what is missing, in one request, while training goes on: one for all would wait for the last node


def acts(state: State) -> bool:
    """Whether nodes are asked for, used and given back without being asked to."""
    return state.driver.acts and not state.ended and state.paused is None


def nears_limit(allocation: Allocation, now: float, policy: Policy) -> bool:
    """Whether its time limit is near enough to look for a successor: a quarter of a short allocation at most."""
    return _ends_within(allocation, policy.capacity.successor_seconds, now)


def _ends_within(allocation: Allocation, seconds: float, now: float) -> bool:
    """Whether the scheduler ends it within `seconds`, or within the last quarter of a short allocation.

    The end is a time of the scheduler's clock, and `now` one of ours. An allocation that is held although its end is
    past shows that the clocks disagree: its limit is not known, and it is used until the scheduler ends it.
    """
    end = allocation.ends_at
    if end is None or now > end + SKEW_SECONDS:
        return False
    return now > end - min(seconds, max(0.0, end - allocation.since) / 4)


def outliving_limit(state: State, names: Iterable[str], now: float, policy: Policy) -> list[str]:
    """Those of the held nodes `names` whose allocation is not about to end."""
    goes = {each.name for each in state.live_allocations if each.holds and nears_limit(each, now, policy)}
    return [name for name in names if state.held[name].name not in goes] if goes else list(names)


def final_save_due(allocation: Allocation, now: float, policy: Policy) -> bool:
    """Whether it ends so soon that nothing new may start on it."""
    return _ends_within(allocation, policy.capacity.last_call_seconds, now)


def eligible_nodes(state: State, policy: Policy, now: float) -> list[str]:
    """The held nodes on which an attempt may start, those that stay longest first."""
    goes = {each.name for each in state.live_allocations if each.holds and nears_limit(each, now, policy)}
    ends = {each.name for each in state.live_allocations if each.holds and final_save_due(each, now, policy)}
    fit = _fitness(state.held, state.nodes, policy)[0]
    ends |= {each.name for each in state.live_allocations if each.suspended}
    if not goes and not ends:
        return list(fit)
    fit = [name for name in fit if state.held[name].name not in ends]
    return sorted(fit, key=lambda name: state.held[name].name in goes)


@memoize_recent
def _fitness(held: Mapping[str, Allocation], nodes: Mapping[str, Node], policy: Policy) -> tuple[list[str], list[str]]:
    """The held nodes that are fit, and those that are not."""
    fit: list[str] = []
    unfit: list[str] = []
    for name in held:
        node = nodes.get(name)
        (fit if node is not None and _is_eligible(node, policy) else unfit).append(name)
    return fit, unfit


def _is_eligible(node: Node, policy: Policy) -> bool:
    """Whether the node is known, not excluded, not suspect, and reads the GPUs that it should have."""
    if node.excluded_by is not None:
        return False
    blind_without_gpus = (
        policy.expected_gpus == 0 and node.verdict is Verdict.UNKNOWN and node.reason.startswith("nvml_")
    )
    return node.verdict is Verdict.HEALTHY or blind_without_gpus


def useful_nodes(state: State, policy: Policy, now: float) -> list[str]:
    """The held nodes that need no replacement: fit, or not judged for long enough to be given up."""
    fit, unfit = _fitness(state.held, state.nodes, policy)
    return fit + [name for name in unfit if _still_awaited(state, name, now, policy)]


def _still_awaited(state: State, name: str, now: float, policy: Policy) -> bool:
    node, allocation = state.nodes.get(name), state.held[name]
    if node is None:
        return still_waiting(now, allocation.since, policy.preflight_seconds)
    if node.excluded_by is not None or node.verdict is Verdict.BAD:
        return False
    patience = policy.preflight_seconds if node.reason == BURNING_IN else policy.unfit_seconds
    return still_waiting(now, max(allocation.since, min(node.at, now)), patience)


def resize(state: State, now: float, policy: Policy) -> Event | None:
    """Rather train on fewer nodes than wait; and on more again once there are more."""
    attempt = state.attempt
    if not acts(state) or state.run is None or not state.shape.min_nodes:
        return None
    fit = min(len(eligible_nodes(state, policy, now)), state.shape.nodes)
    if attempt is not None and attempt.live:
        began = attempt.first_step_at
        settled = began is not None and not still_waiting(now, began, policy.capacity.grow_seconds)
        if settled and fit > max(state.wanted_nodes, len(attempt.nodes)):
            return SizeDecided(nodes=fit, why=f"{fit} nodes are fit again, {len(attempt.nodes)} are in use")
        return None
    short_since = max([a.since for a in state.live_allocations if a.holds], default=now)
    short_since = max(short_since, attempt.ended_at or 0.0 if attempt else 0.0)
    tried = not still_waiting(now, short_since, policy.capacity.shrink_seconds)
    if state.shape.min_nodes <= fit < state.wanted_nodes and tried:
        waited = f"no more for {now - short_since:.0f} s"
        return SizeDecided(nodes=fit, why=f"{fit} of {state.shape.nodes} nodes are fit, {waited}")
    return None


def release(state: State, now: float, policy: Policy) -> Event | None:
    """Give nodes back: nothing is trained any more, none of them is fit, there are enough without, or only spares keep
    us in the queue."""
    attempt = state.attempt
    used = set(attempt.nodes) if attempt is not None and attempt.live else set[str]()
    useful = set(useful_nodes(state, policy, now))
    stay = set(outliving_limit(state, useful, now, policy))
    for allocation in state.live_allocations:
        if allocation.release_at is not None or not used.isdisjoint(_own(state, allocation)):
            continue
        why = _done_with(state, bool(used)) or (
            _superfluous(state, allocation, useful, stay, now, policy) if acts(state) else ""
        )
        if why:
            return ReleaseIntended(allocation=allocation.name, why=why)
    return None


def _own(state: State, allocation: Allocation) -> list[str]:
    return [node for node in allocation.nodes if node in state.held and state.held[node].name == allocation.name]


def _done_with(state: State, training: bool) -> str:
    if state.ended:
        return f"the lineage is {state.status}"
    if state.paused is not None and not state.paused.keep_nodes and not training:
        return f"paused by {state.paused.author}"
    return ""


def _superfluous(
    state: State, allocation: Allocation, useful: set[str], stay: set[str], now: float, policy: Policy
) -> str:
    shape, attempt = state.shape, state.attempt
    training = attempt is not None and attempt.live
    since = max(allocation.since, attempt.ended_at or 0.0 if attempt else 0.0)
    waited = now - since
    if allocation.pending:
        with_spares = allocation.job is not None and allocation.wanted > shape.nodes - len(useful)
        if with_spares and shape.spares and not training and not still_waiting(now, since, policy.spare_seconds):
            return f"in the queue for {waited:.0f} s: {shape.nodes} nodes without spares may be had sooner"
        return ""
    own = _own(state, allocation)
    if useful.isdisjoint(own):
        unfit = not still_waiting(now, since, policy.unfit_seconds)
        return f"none of its nodes is fit after {waited:.0f} s" if unfit else ""
    without = len(stay) - len(stay.intersection(own))
    if training and without >= shape.nodes + shape.spares:
        return f"{without} nodes are held without it"
    return ""


def allocate(state: State, now: float, policy: Policy) -> Event | None:
    """Nodes are missing: ask for them. What is needed to train is asked for a few times, then a human is called."""
    if not acts(state) or awaits_verdict(state, now, policy):
        return None
    shape, attempt = state.shape, state.attempt
    stay = outliving_limit(state, useful_nodes(state, policy, now), now, policy)
    pending = sum(allocation.wanted for allocation in state.live_allocations if allocation.pending)
    missing = shape.nodes + shape.spares - len(stay) - pending
    training = attempt is not None and attempt.live
    urgent = not training and len(eligible_nodes(state, policy, now)) < shape.least
    since_last = list(takewhile(lambda each: not each.ran, reversed(list(state.allocations.values()))))
    stopped_at = attempt.ended_at or 0.0 if attempt is not None else 0.0
    if urgent:  # what was tried while training went on could wait
        since_last = [each for each in since_last if each.intended_at >= stopped_at]
    fruitless = [each for each in since_last if each.failed is not None or each.release_at is not None]
    if urgent and fruitless:
        missing -= shape.spares  # training without spares is better than not training
    if missing <= 0:
        return None
    refused = [each for each in fruitless if each.failed is not None]
    if urgent and len(refused) >= policy.submit_tries:
        return LineageHalted(why=f"no nodes after {len(refused)} tries: {refused[0].failed}", incident=None)
    if not urgent and len(stay) >= shape.least:
        missing = math.ceil(missing * _PART)
    newest, pause = state.allocation, _refusal_backoff(policy, urgent).pause(len(refused))
    if (refused and still_waiting(now, refused[0].since, pause)) or (
        newest and still_waiting(now, newest.intended_at, _REQUEST_SPACING_SECONDS)
    ):
        return None
    excluded = {name for name, node in state.nodes.items() if node.excluded_by is not None}
    excluded |= set(outliving_limit(state, state.held, now, policy))
    return AllocationIntended(
        allocation=f"{state.intent.lineage}-n{len(state.allocations)}",
        nodes=missing,
        exclude=tuple(sorted(excluded)),
        why=f"{len(stay)} of {shape.nodes + shape.spares} nodes are held, {pending} are asked for",
    )


def _refusal_backoff(policy: Policy, urgent: bool) -> Backoff:
    """Pauses after refused requests. They grow only while training goes on without the nodes."""
    if urgent:
        return Backoff(policy.submit_wait_seconds)
    top_up = policy.capacity.top_up_seconds
    return Backoff(first=2 * top_up, factor=2.0, most=16 * top_up)


def launch(state: State, now: float, policy: Policy) -> Event | None:
    """Nodes are held and nothing runs: start the newest run's next attempt."""
    run = state.run
    if state.ended or state.paused is not None or run is None or (state.attempt and state.attempt.live):
        return None
    if any(probing(state.incidents[name]) for name in state.open_incidents):
        return None  # what the probes show decides how it goes on
    if open_proposals(state) or held_back(state) is not None:
        return None  # so does the answer of a person
    if state.driver is Driver.SHADOW:
        return _foreign(state, run.name)
    waiting = waiting_for_attempt(state)
    asked = state.resumed is not None or any(incident.kind == FailureClass.OPERATOR for incident in waiting)
    if state.driver is Driver.OPERATOR and not asked:
        return None
    if under_examination(state, run.name, now, policy.examine_seconds) or awaits_verdict(state, now, policy):
        return None
    nodes = eligible_nodes(state, policy, now)[: state.wanted_nodes]
    joining = any(
        name not in state.nodes and still_waiting(now, allocation.since, policy.join_seconds)
        for name, allocation in state.held.items()
    )
    if len(nodes) < state.wanted_nodes or joining:
        return None
    number = sum(attempt.run == run.name for attempt in state.attempts.values())
    known = newest_good(state, run.name, nodes=nodes)
    if known is None and (parent := state.intent.parent) is not None:
        return _without_parent(state, run, parent, now, policy)
    reached = max((each.last_step or 0 for each in state.attempts.values()), default=0)
    if known is None and run.checkpoint is None and reached > SCRATCH_STEPS:
        ended = state.attempt.ended_at if state.attempt else None
        if ended is not None and still_waiting(now, ended, policy.examine_seconds):
            return None  # a file system that hides them for a moment shows them again
        why = f"no good checkpoint is left at step {reached}; training does not start over without an operator"
        return LineageHalted(why=f"{why}. Restore one, then resume; or start a new lineage", incident=None)
    return AttemptIntended(
        attempt=attempt_name(run.name, number),
        run=run.name,
        nodes=tuple(nodes),
        ranks_per_node=state.shape.ranks_per_node,
        checkpoint=known.checkpoint if known else run.checkpoint,
        incident=waiting[0].name if waiting else None,
    )


def _without_parent(state: State, run: Run, parent: Parent, now: float, policy: Policy) -> LineageHalted | None:
    """A fork has no good checkpoint: that of its parent is being read, or training does not start from scratch."""
    judged = state.checkpoints.get(parent.checkpoint)
    ended = state.attempt.ended_at or 0.0 if state.attempt else 0.0
    if judged is None and still_waiting(now, max(run.planned_at, ended, state.asked_at), policy.examine_seconds):
        return None  # it was not looked at yet, or a file system hides it for a moment
    if judged is not None and judged.verified is None:
        return None
    found = f"is damaged: {judged.why}" if judged is not None else "is gone"
    why = f"this lineage began from step {parent.step} of {parent.run}, and that checkpoint {found}"
    return LineageHalted(why=f"{why}. Restore it, then resume; or fork another step", incident=None)


def _foreign(state: State, run: str) -> AttemptIntended | None:
    """Another launcher's training, as an attempt without nodes of ours: it is watched, and that is all."""
    if state.attempts:
        return None
    return AttemptIntended(
        attempt=attempt_name(run, 0), run=run, nodes=(), ranks_per_node=0, checkpoint=None, incident=None
    )
