"""Evaluations of checkpoints: which one is begun, where, and when it gives way. The last rule: all else goes first.

A milestone is the first sound checkpoint at or after each multiple of `every`, on the way to the present weights, and
the last one of a completed lineage. Nothing is queued: what is due follows from the state at each look, the newest
first, and milestones that are too old are left out. So a checkpoint that is gone or was taken back is due no more, and
evaluations that are slower than training leave no backlog.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from opt_ops.core.decide.capacity import eligible_nodes, final_save_due, outliving_limit
from opt_ops.core.decide.policy import EvaluationRule, Policy
from opt_ops.core.events import EvaluationEnded, EvaluationIntended, Event
from opt_ops.core.memo import memoize_recent
from opt_ops.core.names import evaluation_name
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.checkpoints import Evaluation, KnownCheckpoint
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import counting_steps, probing
from opt_ops.core.state.status import Status
from opt_ops.core.values import Checkpoint, Driver, EvaluationEnd, Verdict
from opt_ops.core.waiting import still_waiting

FAILURES = 2
"""That a checkpoint's evaluation may have, before a person is told and it is left alone."""

LOSSES = 3
"""The same for evaluations whose node went away: an evaluation may be what takes nodes down."""

RETRY_SECONDS = 600.0  # after a failure

MILESTONES = 16
"""The newest ones, of which none is skipped. Older ones are left to `ckpt evaluate`."""

NO_NODES_SECONDS = 600.0
"""How long a lineage that trains on waits without nodes for the next ones, before the daemon's host evaluates."""

COMPLETED_SECONDS = 86_400.0
"""How long after the end of a lineage evaluations of it begin: one that ended under other settings is left alone."""

_OVER = (Status.HALTED, Status.CANCELLED)


def evaluate(state: State, now: float, policy: Policy) -> Event | None:
    """End the evaluation whose place is needed, or begin the next one."""
    if (running := state.evaluation) is not None:
        return _end(state, running, now, policy)
    rule, milestones = policy.evaluation, _to_begin(state, now, policy)
    ready = next((each for each in milestones if not _rests(state, each.checkpoint, now)), None)
    if ready is None:
        return None
    node = None if (beside := _beside(state, now, policy)) else _spare(state, now, policy)
    if node is None and not beside:
        return None
    return EvaluationIntended(
        evaluation=evaluation_name(state.intent.lineage, len(state.evaluations) + 1),
        checkpoint=ready.checkpoint,
        node=node,
        tasks=rule.tasks if ready.tasks else (),
        samples=ready.samples,
    )


def to_come(state: State, now: float, policy: Policy) -> bool:
    """Whether a lineage that has ended is still to be evaluated, perhaps again after a failure."""
    return state.ended and bool(_to_begin(state, now, policy))


# ---- what is due


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestone:
    """A checkpoint that is to be evaluated: by the tasks, by the fixed prompts, or both."""

    checkpoint: Checkpoint
    tasks: bool
    samples: bool


def due(state: State, rule: EvaluationRule) -> Sequence[Milestone]:
    """The milestones that wait for an evaluation, the newest first."""
    if not (rule.every or rule.samples_every) or state.run is None:
        return ()
    return _due(state.checkpoints, state.evaluations, state.runs, state.status is Status.COMPLETED, rule)


def _to_begin(state: State, now: float, policy: Policy) -> Sequence[Milestone]:
    if state.driver is Driver.SHADOW or state.status in _OVER:
        return ()
    late = state.ended and not still_waiting(now, state.since, COMPLETED_SECONDS)
    return () if late else due(state, policy.evaluation)


def given_up(state: State) -> Sequence[Evaluation]:
    """The evaluations after which their checkpoints are left alone: they have failed, or were lost, too often."""
    return _given_up(state.evaluations)


@memoize_recent
def _due(
    checkpoints: Mapping[str, KnownCheckpoint],
    evaluations: Mapping[str, Evaluation],
    runs: Mapping[str, Run],
    completed: bool,
    rule: EvaluationRule,
) -> Sequence[Milestone]:
    on_the_way = counting_steps(State(runs=runs), next(reversed(list(runs))))

    def counts(checkpoint: Checkpoint) -> bool:  # those of a fork's parent are evaluated there
        return checkpoint.run in runs and on_the_way(checkpoint.run, checkpoint.step)

    durable = (each for each in checkpoints.values() if not each.checkpoint.nodes and counts(each.checkpoint))
    known = sorted(durable, key=lambda each: each.checkpoint.step)
    done = [each for each in evaluations.values() if each.end is EvaluationEnd.DONE]
    over = [each.intended for each in (*done, *_given_up(evaluations)) if counts(each.intended.checkpoint)]
    tasks = _wanted(known, {each.checkpoint.step for each in over if each.tasks}, rule.every, completed)
    samples = _wanted(known, {each.checkpoint.step for each in over if each.samples}, rule.samples_every, completed)
    return [
        Milestone(checkpoint=each, tasks=each.step in tasks, samples=each.step in samples)
        for each in (one.checkpoint for one in reversed(known))
        if each.step in tasks | samples
    ]


def _wanted(known: Sequence[KnownCheckpoint], over: Collection[int], every: int, completed: bool) -> set[int]:
    """The steps of the milestones that wait. A milestone waits for the examination of what may become it."""
    if not every:
        return set()
    possible = [each for each in known if each.good or each.verified is None]
    first: dict[int, KnownCheckpoint] = {}
    for each in possible:
        first.setdefault(each.checkpoint.step // every, each)
    newest, done = max(first, default=0), {step // every for step in over}
    numbers = (each for each in first if each > max(0, newest - MILESTONES) and each not in done)
    wanted = {first[number].checkpoint.step for number in numbers if first[number].good}
    last = next((each.checkpoint.step for each in reversed(possible) if each.good), None)
    return wanted | {last} if completed and last is not None and last not in over else wanted


@memoize_recent
def _given_up(evaluations: Mapping[str, Evaluation]) -> Sequence[Evaluation]:
    tries: Counter[tuple[Checkpoint, EvaluationEnd]] = Counter()
    over: list[Evaluation] = []
    for each in evaluations.values():
        if each.end is EvaluationEnd.FAILED or (each.end is EvaluationEnd.LOST and each.intended.node is not None):
            case = (each.intended.checkpoint, each.end)
            tries[case] += 1
            if tries[case] == (FAILURES if each.end is EvaluationEnd.FAILED else LOSSES):
                over.append(each)
    return over


def _rests(state: State, checkpoint: Checkpoint, now: float) -> bool:
    """Whether its evaluation has failed so lately that it is not tried again yet."""
    failures = (
        each.ended_at
        for each in state.evaluations.values()
        if each.end is EvaluationEnd.FAILED and each.intended.checkpoint == checkpoint
    )
    return any(still_waiting(now, at, RETRY_SECONDS) for at in failures if at is not None)


# ---- where


def _beside(state: State, now: float, policy: Policy) -> bool:
    """Whether the daemon's host is the place: it is configured, or the lineage holds no node that could do it."""
    if not policy.evaluation.on_spares or state.ended:
        return True
    return not state.held and not still_waiting(now, state.since, NO_NODES_SECONDS)


def _spare(state: State, now: float, policy: Policy) -> str | None:
    """An idle node, the one that a launch would take last; None: there is none, or training is about to change."""
    attempt = state.attempt
    if attempt is None or not attempt.live or attempt.first_step is None or attempt.rejoining is not None:
        return None
    if attempt.leave_at is not None or attempt.stop_why is not None or state.paused is not None or state.ended:
        return None
    taken = {*attempt.nodes, *_probed(state)}
    idle = outliving_limit(state, eligible_nodes(state, policy, now), now, policy)
    return next((name for name in reversed(idle) if name not in taken), None)


def _probed(state: State) -> set[str]:
    """The nodes on which probes run."""
    of = (state.incidents[name] for name in state.open_incidents)
    return {probe.node for each in of if each.probes and probing(each) for probe in each.probes.probes}


def _end(state: State, running: Evaluation, now: float, policy: Policy) -> EvaluationEnded | None:
    """Why it cannot go on where it is; None: it can."""
    node = running.intended.node
    if node is None:
        if running.epoch != state.epoch:
            return _ended(running, EvaluationEnd.LOST, "the daemon process that ran it has ended")
        if state.status is Status.CANCELLED:
            return _ended(running, EvaluationEnd.GIVEN_UP, "the lineage is cancelled")
        if not _beside(state, now, policy) and (spare := _spare(state, now, policy)) is not None:
            return _ended(running, EvaluationEnd.GIVEN_UP, f"{spare} is idle and does it")
        return None
    if (holder := state.held.get(node)) is None:
        released = any(node in each.nodes and each.release_at is not None for each in state.live_allocations)
        how = (EvaluationEnd.GIVEN_UP, "given back") if released else (EvaluationEnd.LOST, "not held any more")
        return _ended(running, how[0], f"{node} is {how[1]}")
    known, attempt = state.nodes.get(node), state.attempt
    if known is not None and known.reason == "silent":
        return _ended(running, EvaluationEnd.LOST, f"{node} is silent")
    if attempt is not None and attempt.live and node in attempt.nodes:
        return _ended(running, EvaluationEnd.GIVEN_UP, f"{attempt.name} needs {node}")
    if node in _probed(state):
        return _ended(running, EvaluationEnd.GIVEN_UP, f"a probe needs {node}")
    if known is None or known.excluded_by is not None or known.verdict is Verdict.BAD:
        return _ended(running, EvaluationEnd.GIVEN_UP, f"{node} is not fit any more")
    if final_save_due(holder, now, policy):
        return _ended(running, EvaluationEnd.GIVEN_UP, f"the job that holds {node} is about to end")
    return None


def _ended(running: Evaluation, end: EvaluationEnd, why: str) -> EvaluationEnded:
    return EvaluationEnded(evaluation=running.name, end=end, why=why)
