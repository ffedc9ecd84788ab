"""Sentences of runs, allocations, attempts and checkpoints."""

from __future__ import annotations

import math
import re
import signal as signals
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.text import duration
from opt_ops.core.told.phrase import (
    Forms,
    acts,
    after,
    because,
    count,
    counted,
    figure,
    hour,
    listed,
    name,
    seen,
)
from opt_ops.core.values import AllocationStatus, Checkpoint, LrFactor, Outcome, RankExit

_JOULES = 3_600_000.0  # of a kilowatt-hour
_STEPS = 5  # that are named; of more checkpoints the number is told


def from_step(checkpoint: Checkpoint | None) -> str:
    """`from step 125`; without a checkpoint `from scratch`."""
    return f"from step {checkpoint.step:,}" if checkpoint else "from scratch"


def _run(event: e.RunPlanned, known: State | None) -> Forms:
    changes = [
        *_new_factors(event.lr_factors, event.parent, known),
        *_new_settings(event, known),
        *([f"without the batches {each.first:,} to {each.last:,}" for each in event.skips[-1:]]),
        *_new_data(event, known),
    ]
    where = ", ".join([f"{name(event.run)} {from_step(event.checkpoint)}", *changes])
    why = f" ({name(event.incident)})" if event.incident else ""
    return Forms(f"{'next' if event.parent else 'first'} run {where}{why}", "begin", where)


def _new_factors(factors: Iterable[LrFactor], parent: str | None, known: State | None) -> list[str]:
    """What the run's learning rate is multiplied by beyond its parent's. Only the state knows what that was."""
    before = known.runs.get(parent or "") if known is not None else None
    if before is None:
        return []
    new = [each.factor for each in factors if each not in before.lr_factors]
    return [f"learning rate × {figure(math.prod(new))}"] if new else []


def _new_data(event: e.RunPlanned, known: State | None) -> list[str]:
    """What the run is trained on beyond its parent's data, or not any more."""
    before = known.runs.get(event.parent or "") if known is not None else None
    if before is None:
        return []
    new = [each.step for each in event.data if each not in before.data]
    gone = [each.step for each in before.data if each not in event.data]
    gone = [step for step in gone if not new or step < min(new)]  # what is new has replaced what was to come later
    return [
        *([f"the data of before step {min(gone):,}"] if gone else []),
        *(f"other data after step {step:,}" for step in new[-1:]),
    ]


def _new_settings(event: e.RunPlanned, known: State | None) -> list[str]:
    before = known.runs.get(event.parent or "") if known is not None else None
    return [name(each) for each in event.settings if before is not None and each not in before.settings][:3]


def _allocation(event: e.AllocationIntended, known: State | None) -> Forms:
    unfit = [node for node in event.exclude if known is None or _is_unfit(node, known)]
    without = f", without {listed(unfit)}" if unfit else ""
    return acts("ask", f"for {count(event.nodes, 'node')}{without}")


def _is_unfit(node: str, known: State) -> bool:
    """Whether a node is not wanted: a request names the nodes that are held already, too."""
    found = known.nodes.get(node)
    return node not in known.held or (found is not None and found.excluded_by is not None)


def _submitted(event: e.AllocationSubmitted, known: State | None) -> Forms:
    how = "was asked for already" if event.adopted else "asked for"
    job, whose = f"job {name(event.job)}", f"({name(event.allocation)})"
    return Forms(f"{job} {how} {whose}", "ask", f"for {job} {whose}")


def _failed(event: e.AllocationFailed, known: State | None) -> Forms:
    nodes = f"no nodes{after(': ', event.why)}"
    return Forms(nodes, "get", nodes)


def _changed(event: e.AllocationChanged, known: State | None) -> Forms:
    held = known.allocations.get(event.allocation) if known is not None else None
    job = f"job {name(held.job)}" if held is not None and held.job else f"the job of {name(event.allocation)}"
    why = f": {name(event.reason)}" if event.reason.strip() else ""
    match event.status:
        case AllocationStatus.QUEUED:
            return seen(f"{job} waits for nodes{why}")
        case AllocationStatus.RUNNING:
            until = f" until {hour(event.ends_at)}" if event.ends_at is not None else ""
            return seen(f"{job} runs on {listed(event.nodes)}{until}")
        case AllocationStatus.SUSPENDED:
            return seen(f"{job} is suspended, its {count(len(event.nodes), 'node')} kept{why}")
        case AllocationStatus.ENDED:
            return seen(f"{job} is over{why}")
        case AllocationStatus.UNKNOWN:
            return seen(f"the state of {job} is not known{why}")


def _stray(event: e.StrayFound, known: State | None) -> Forms:
    past = f"job {name(event.job)} bears our name and belongs to nothing: cancelling it"
    return Forms(past, "cancel", f"job {name(event.job)}, which bears our name and belongs to nothing")


def _stray_cancelled(event: e.StrayCancelled, known: State | None) -> Forms:
    return seen(f"job {name(event.job)} is cancelled")


def _size(event: e.SizeDecided, known: State | None) -> Forms:
    of = f"{event.nodes:,} of {known.shape.nodes:,} nodes" if known is not None and known.lineage else None
    return Forms(
        f"goes on with {of or count(event.nodes, 'node')}", "go on", f"with {of or count(event.nodes, 'node')}"
    )


def _paused(event: e.LineagePaused, known: State | None) -> Forms:
    attempt = known.attempt if known is not None else None
    if attempt is not None and attempt.last_step is not None:
        return acts("rest", f"since step {attempt.last_step:,}")
    return acts("rest", after("as asked: ", event.why))


def _release(event: e.ReleaseIntended, known: State | None) -> Forms:
    held = known.allocations.get(event.allocation) if known is not None else None
    if held is not None and not held.nodes:
        return Forms(
            f"withdraws the request for {count(held.wanted, 'node')}",
            "withdraw",
            f"the request for {count(held.wanted, 'node')}",
        )
    nodes = listed(held.nodes) if held is not None else f"the nodes of {name(event.allocation)}"
    return Forms(f"gives back {nodes}", "give back", nodes)


def _attempt(event: e.AttemptIntended, known: State | None) -> Forms:
    return acts("start", f"{name(event.attempt)} on {listed(event.nodes)} {from_step(event.checkpoint)}")


def _started(event: e.AttemptStarted, known: State | None) -> Forms:
    attempt = known.attempts.get(event.attempt) if known is not None else None
    if attempt is None or not attempt.ranks:
        return seen(f"the ranks of {name(event.attempt)} run")
    one = attempt.ranks == 1
    return seen(f"the {'rank' if one else count(attempt.ranks, 'rank')} of {name(event.attempt)} run{'s' * one}")


def _configured(event: e.AttemptConfigured, known: State | None) -> Forms:
    rate = f" at peak {figure(event.schedule.peak_lr)}" if event.schedule.peak_lr else ""
    betas = " and ".join(map(figure, event.optimizer.betas[:2]))
    with_betas = f", betas {betas}" if betas else ""
    torch = event.versions.get("torch")
    version = f"; torch {name(torch)}" if isinstance(torch, str) and torch else ""
    clip = f", clip {figure(event.optimizer.clip_norm)}"
    return seen(f"{name(event.attempt)} trains to step {event.steps:,}{rate}{with_betas}{clip}{version}")


def _progressed(event: e.AttemptProgressed, known: State | None) -> Forms:
    pace = f", {duration(event.step_seconds)} a step" if event.step_seconds is not None else ""
    read = event.readbacks or event.generation_readbacks
    if not read:
        return seen(f"{name(event.attempt)} is at step {event.step:,}{pace}")
    steps = f"{read[0].step:,}" if len(read) == 1 else f"{read[0].step:,} to {read[-1].step:,}"
    rate = f"; learning rate {figure(read[0].lr, 6)} read back at {steps}"
    return seen(f"{name(event.attempt)} is at step {event.step:,}{pace}{rate}")


def _energy(event: e.EnergyMetered, known: State | None) -> Forms:
    used = f"{figure(event.joules / _JOULES, 3)} kWh in {duration(event.until - event.since)}"
    return seen(f"{count(event.gpus, 'GPU')} used {used}")


def _where(attempt: str, known: State | None) -> str:
    found = known.attempts.get(attempt) if known is not None else None
    return f" on {listed(found.nodes)}" if found is not None and found.nodes else ""


def _why(incident: str | None, why: str) -> str:
    return f" ({name(incident)})" if incident else because(why)


def _leave(event: e.LeaveIntended, known: State | None) -> Forms:
    what = f"{name(event.attempt)}{_where(event.attempt, known)}"
    why = _why(event.incident, event.why)
    return Forms(f"saves, then ends {what}{why}", "save", f"then end {what}")


def _stop(event: e.StopIntended, known: State | None) -> Forms:
    what = f"{name(event.attempt)}{_where(event.attempt, known)}"
    return Forms(f"ends {what}{_why(event.incident, event.why)}", "end", what)


def _stacks(event: e.StacksIntended, known: State | None) -> Forms:
    return acts("ask", f"every rank of {name(event.attempt)} where it is")


def _stacks_taken(event: e.StacksTaken, known: State | None) -> Forms:
    if not event.groups:
        return seen("no rank says where it is")
    most = event.groups[0]
    place = _frame(most.frames)
    if len(event.groups) == 1 and not event.odd:
        return seen(f"all {count(len(most.ranks), 'rank')} that answer are in {place}")
    odd = next((group for group in event.groups[1:] if set(group.ranks) & set(event.odd)), None)
    if odd is not None:
        where = f" ({listed(event.nodes)})" if event.nodes else ""
        who = f"{_ranks(odd.ranks)}{where} {'is' if len(odd.ranks) == 1 else 'are'} in {_frame(odd.frames)}"
        return seen(f"{who}, {len(most.ranks):,} others in {place}")
    if event.silent:
        return seen(f"{_ranks(event.silent)} {_do(event.silent)} not answer, {len(most.ranks):,} others are in {place}")
    return seen(f"the ranks are in {count(len(event.groups), 'place')}, {len(most.ranks):,} of them in {place}")


def _do(ranks: tuple[int, ...]) -> str:
    return "does" if len(ranks) == 1 else "do"


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]:,}" if len(ranks) == 1 else count(len(ranks), "rank")


def _frame(frames: tuple[str, ...]) -> str:
    return name(frames[0]) if frames else "an unknown place"


def _ended(event: e.AttemptEnded, known: State | None) -> Forms:
    at = f" at step {event.last_step:,}" if event.last_step is not None else " before its first step"
    lead = f"{name(event.attempt)} is over{at}"
    silent = f"; {listed(event.unreachable)} not reached" if event.unreachable else ""
    match event.outcome:
        case Outcome.COMPLETED:
            return seen(f"{lead}: every rank is done{silent}")
        case Outcome.STOPPED:
            return seen(f"{lead}: it was stopped{silent}")
        case Outcome.LOST:
            return seen(f"{lead}: its nodes are gone{silent}")
        case Outcome.FAILED:
            return seen(f"{lead}{_first_exit(event)}{silent}")


def _first_exit(event: e.AttemptEnded) -> str:
    if not event.exits:
        return ": a rank failed"
    others = sum(event.ended.values()) - 1 if event.ended else len(event.exits) - 1
    after_it = f", {count(others, 'other')} ended after it" if others > 0 else ""
    return f": {_exit(event.exits[0])}{after_it}"


def _exit(ended: RankExit) -> str:
    who = f"rank {ended.rank:,} on {name(ended.node)}"
    if ended.signal is not None:
        return f"{who} was killed ({_signal(ended.signal)})"
    return f"{who} left with code {ended.code}" if ended.code is not None else f"{who} is gone"


def _signal(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number:,}"


def _saved(checkpoint: Checkpoint) -> str:
    return f"{'the snapshot of ' if checkpoint.nodes else ''}step {checkpoint.step:,}"


def _checkpoint(event: e.CheckpointSeen, known: State | None) -> Forms:
    return seen(f"{_saved(event.checkpoint)} is saved")


def _verified(event: e.CheckpointVerified, known: State | None) -> Forms:
    what = "sound and healthy" if event.healthy else "sound, but not healthy"
    return seen(f"{_saved(event.checkpoint)} is read back: {what}{because('' if event.healthy else event.why)}")


def _damaged(event: e.CheckpointRefused, known: State | None) -> Forms:
    return seen(f"{_saved(event.checkpoint)} is damaged{because(event.why)}")


def _gone(event: e.CheckpointsGone, known: State | None) -> Forms:
    steps = [int(found[1]) for path in event.paths if (found := re.search(r"-(\d{1,12})$", path))]
    if not steps or len(steps) != len(event.paths) or len(steps) > _STEPS:
        gone = "is" if len(event.paths) == 1 else "are"
        return seen(f"{count(len(event.paths), 'checkpoint')} of {name(event.run)} {gone} gone")
    one = len(steps) == 1
    return seen(f"{'step' if one else 'steps'} {counted(steps)} {'is' if one else 'are'} gone")


RULES: Mapping[type[e.Event], Callable[[Any, State | None], Forms]] = {
    e.RunPlanned: _run,
    e.AllocationIntended: _allocation,
    e.AllocationSubmitted: _submitted,
    e.AllocationFailed: _failed,
    e.AllocationChanged: _changed,
    e.StrayFound: _stray,
    e.StrayCancelled: _stray_cancelled,
    e.SizeDecided: _size,
    e.LineagePaused: _paused,
    e.ReleaseIntended: _release,
    e.AttemptIntended: _attempt,
    e.AttemptStarted: _started,
    e.AttemptConfigured: _configured,
    e.AttemptProgressed: _progressed,
    e.EnergyMetered: _energy,
    e.LeaveIntended: _leave,
    e.StopIntended: _stop,
    e.StacksIntended: _stacks,
    e.StacksTaken: _stacks_taken,
    e.AttemptEnded: _ended,
    e.CheckpointSeen: _checkpoint,
    e.CheckpointVerified: _verified,
    e.CheckpointRefused: _damaged,
    e.CheckpointsGone: _gone,
}
