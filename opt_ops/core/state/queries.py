"""Questions about a state that rules, watchers, commands and the chronicle ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.checkpoints import KnownCheckpoint
from opt_ops.core.state.model import Allocation, Incident, Proposal, State
from opt_ops.core.values import (
    Action,
    Checkpoint,
    Driver,
)
from opt_ops.core.waiting import still_waiting

_Result = TypeVar("_Result", CheckpointEvaluated, CheckpointSampled)


def waiting_for_attempt(state: State) -> list[Incident]:
    """Open incidents whose recovery is an attempt that is not proven yet."""
    return [
        incident
        for incident in (state.incidents[name] for name in state.open_incidents)
        if incident.decision is not None
        and incident.acted_on
        and incident.decision.action in (Action.RESTART, Action.ROLLBACK, Action.RECONFIGURE)
    ]


def suspended(state: State, attempt: Attempt) -> Allocation | None:
    """The allocation, if one is suspended in which the attempt runs: then it makes no progress, and that is no hang."""
    holders = (state.held.get(node) for node in attempt.nodes)
    return next((holder for holder in holders if holder is not None and holder.suspended), None)


def probing(incident: Incident) -> bool:
    """Whether its decision waits for probes."""
    return incident.probes is not None and not incident.probes_judged


def last_step(state: State) -> int | None:
    """The newest step of the newest attempt; None: it has made none."""
    return state.attempt.last_step if state.attempt is not None else None


def open_proposals(state: State) -> list[Proposal]:
    """What waits for a person's answer, oldest first."""
    newest = (state.incidents[name].proposal for name in state.open_incidents)
    return [each for each in newest if each is not None and each.answer is None and not state.ended]


def held_back(state: State) -> Incident | None:
    """The incident because of which nothing is started: its recovery was proposed and refused, and nothing trains.

    It ends when a person resumes or changes the lineage, or hands back.
    """
    attempt = state.attempt
    if attempt is None or attempt.live:
        return None
    of_attempt = (each for each in reversed(list(state.incidents.values())) if each.attempt == attempt.name)
    newest = next((each for each in of_attempt if each.kind != FailureClass.DAEMON_RESTART), None)
    waits = newest is not None and not newest.answered and leaves_standing(state, newest)
    return newest if waits else None


def leaves_standing(state: State, incident: Incident) -> bool:
    """Whether its recovery was proposed while nothing trained, and refused: what follows of it is no news.

    Where its attempt has made steps since, it trains after all.
    """
    proposal, attempt = incident.proposal, state.attempts.get(incident.attempt or "")
    if proposal is None or not proposal.is_refused or proposal.made.trains or attempt is None:
        return False
    then = max(incident.step_failed or 0, (proposal.answer.step if proposal.answer else None) or 0)
    return state.driver is Driver.ASK and (attempt.last_step or 0) <= then


def ancestry(state: State, run: str) -> list[tuple[str, int | None]]:
    """The runs that `run`'s weights passed through, newest first, each with the last step that counts (None: all).

    Of a fork, the last one is the parent's run.
    """
    chain: list[tuple[str, int | None]] = [(run, None)]
    while (known := state.runs.get(chain[-1][0])) is not None and known.checkpoint is not None:
        chain.append((known.checkpoint.run, known.checkpoint.step))
    return chain


def counting_steps(state: State, run: str) -> Callable[[str, int], bool]:
    """Tells of a run and a step of it whether they are part of `run`'s weights."""
    limits = dict(ancestry(state, run))
    return lambda name, step: name in limits and _within(step, limits[name])


def newest_good(
    state: State, run: str, before: int | None = None, nodes: Sequence[str] | None = None
) -> KnownCheckpoint | None:
    """The newest verified, healthy checkpoint on the way to `run`'s weights, at or before step `before`.

    One that `nodes` can read, where they are known: else one that the nodes held can. Of a snapshot and a durable one
    of the same step, the snapshot: it is read faster.
    """
    good = [
        known
        for known in reachable_checkpoints(state, run)
        if known.good and _within(known.checkpoint.step, before) and at_hand(state, known.checkpoint, nodes)
    ]
    return max(good, key=lambda known: (known.checkpoint.step, bool(known.checkpoint.nodes)), default=None)


def at_hand(state: State, checkpoint: Checkpoint, nodes: Sequence[str] | None = None) -> bool:
    """Whether `nodes`, or those that are held and not excluded, have all of it on their disks."""
    if not checkpoint.nodes:
        return True
    here = nodes if nodes is not None else [name for name in state.held if not _excluded(state, name)]
    return all(any(node in here for node in group) for group in checkpoint.nodes)


def _excluded(state: State, name: str) -> bool:
    node = state.nodes.get(name)
    return node is not None and node.excluded_by is not None


def under_examination(state: State, run: str, now: float, patience: float) -> KnownCheckpoint | None:
    """A checkpoint seen within `patience` that would be the newest good one, if its examination finds nothing."""
    newest = newest_good(state, run)
    step = newest.checkpoint.step if newest else 0
    waiting = (known for known in reachable_checkpoints(state, run) if known.verified is None)
    newer = (known for known in waiting if known.checkpoint.step > step)
    return next((known for known in newer if still_waiting(now, known.seen_at, patience)), None)


def has_own_good(state: State) -> bool:
    """Whether a run of this lineage has saved a checkpoint that training may go on from; a snapshot does not count."""
    own = (k for k in state.checkpoints.values() if k.good and not k.checkpoint.nodes)
    return any(known.checkpoint.run in state.runs for known in own)


def last_is_unread(state: State) -> bool:
    """Whether the newest checkpoint of the newest run is still being examined."""
    of_run = [k for k in state.checkpoints.values() if state.run is not None and k.checkpoint.run == state.run.name]
    newest = max(of_run, key=lambda known: known.checkpoint.step, default=None)
    return newest is not None and newest.verified is None


def reachable_checkpoints(state: State, run: str) -> list[KnownCheckpoint]:
    """Those on the way to `run`'s weights: of its ancestors, those up to the step that the next run began from."""
    counts = counting_steps(state, run)
    return [known for known in state.checkpoints.values() if counts(known.checkpoint.run, known.checkpoint.step)]


def counting(state: State) -> set[str]:
    """Paths of the checkpoints whose steps are part of the present weights."""
    return {each.checkpoint.path for each in reachable_checkpoints(state, state.run.name)} if state.run else set()


def counting_results(state: State, results: Iterable[_Result]) -> list[_Result]:
    """Results of the checkpoints whose steps are part of the present weights, in the same order.

    Of a step that was trained and saved again, only what was found on the newest weights.
    """
    if state.run is None:
        return []
    counts = counting_steps(state, state.run.name)
    found = [each for each in results if counts(each.run, each.step)]
    newest = {(each.run, each.step): each.digest for each in found}
    return [each for each in found if each.digest == newest[each.run, each.step]]


def total_steps(state: State) -> int | None:
    """The number of steps that a lineage is to train, as its newest attempt that has said so; None: none has."""
    return next((each.steps for each in reversed(list(state.attempts.values())) if each.steps), None)


def _within(step: int, limit: int | None) -> bool:
    return limit is None or step <= limit


def lr_scale(state: State, run: str) -> float:
    """The product of the learning-rate factors that a run trains under."""
    scale = 1.0
    for factor in state.runs[run].lr_factors:
        scale *= factor.factor
    return scale
