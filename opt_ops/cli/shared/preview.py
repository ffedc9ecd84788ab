"""What `--dry-run` foresees: what the daemon would do about a request, by its own rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from opt_ops.cli.shared.foreseen import Foreseen, of_event, thing
from opt_ops.config import Config
from opt_ops.core import events as e
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.schedule import expected_lr
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.data import change_of, data_now
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.told import foreseen
from opt_ops.core.told.phrase import count
from opt_ops.core.values import LrFactor
from opt_ops.supervise import supervisor
from opt_ops.supervise.site_policy import site_policy

_REQUESTS = (e.StopRequested, e.PauseRequested, e.ResumeRequested, e.ChangeRequested, e.ProposalAnswered)
"""Where something follows from them, that is told and the request is not: whoever asks knows it."""


def preview(state: State, event: e.Event, now: float, config: Config, step: int | None = None) -> Sequence[Foreseen]:
    """What would follow from an event until the world answers: the real decisions, made on a copy of the state.

    Args:
        state: The lineage.
        event: What is asked for, or seen.
        now: When.
        config: The site's.
        step: The newest one that telemetry shows.

    Raises:
        PlaybookError: a playbook page is malformed.
    """
    events = supervisor.preview(state, event, now, site_policy(config))
    coming: list[Foreseen] = []
    known = state
    for each in events:
        lines = list(_lines(known, each, step)) if not _goes_without_saying(known, each, events) else []
        coming.append(of_event(each, known, lines))
        if isinstance(each, e.RunPlanned):
            coming += _dropped(known, each)
        known = fold(known, e.Entry(seq=known.seq + 1, epoch=known.epoch, ts=now, event=each))
    coming += _afterwards(state, event, events)
    return coming


def _goes_without_saying(known: State, event: e.Event, events: Sequence[e.Event]) -> bool:
    """Whether the other lines say it: a request, and the incident and decision that stand for it."""
    if isinstance(event, _REQUESTS):
        return len(events) > 1
    if isinstance(event, e.StopIntended):  # where a checkpoint is there already: the line of the save says so
        return any(isinstance(each, e.LeaveIntended) and each.attempt == event.attempt for each in events)
    if isinstance(event, e.RecoveryDecided):
        return known.incidents[event.incident].kind == FailureClass.OPERATOR
    return isinstance(event, e.IncidentOpened) and event.failure == FailureClass.OPERATOR


def _lines(known: State, event: e.Event, step: int | None) -> Iterator[tuple[str, str]]:
    match event:
        case e.LeaveIntended():
            yield "save", f"at step {step:,} or soon after" if step is not None else "one more checkpoint"
            yield "end", foreseen(event, known)[1].removeprefix("then end ")
        case e.AttemptIntended():
            yield foreseen(event, known)
            if event.checkpoint is None and known.lineage is not None and known.lineage.init_from:
                yield "begin", f"with the weights of {known.lineage.init_from}"
        case e.RunPlanned():
            at = event.checkpoint.step if event.checkpoint else 0
            yield foreseen(event, known)
            yield "train", f"with the learning rate {_rate(known, event.lr_factors, event.settings, at)}"
        case _:
            yield foreseen(event, known)


def _afterwards(state: State, event: e.Event, events: Sequence[e.Event]) -> Iterator[Foreseen]:
    """What follows once the world has answered, as far as it is certain."""
    planned = any(isinstance(each, e.RunPlanned) for each in events)
    if isinstance(event, e.ChangeRequested) and event.to_step is None and state.run is not None and not planned:
        yield thing("run_planned", "begin", f"the next run there{_asked(state, state.run, event)}")
        yield thing("rate", "train", _rate_from_here(state.run, event))
    gives_back = isinstance(event, e.StopRequested) or (isinstance(event, e.PauseRequested) and not event.keep_nodes)
    released = {each.allocation for each in events if isinstance(each, e.ReleaseIntended)}
    nodes = [node for node, held in state.held.items() if held.name not in released]
    if gives_back and nodes:
        yield thing("release_intended", "give back", count(len(nodes), "node"), {"nodes": nodes})


def _asked(state: State, run: Run, change: e.ChangeRequested) -> str:
    parts = [
        *change.settings,
        *([f"{change.skip_batches:,} batches left out"] if change.skip_batches else []),
        *([f"other data: {change_of(data_now(state, run), change.data)}"] if change.data else []),
    ]
    return f", with {', '.join(parts)}" if parts else ""


def _dropped(known: State, planned: e.RunPlanned) -> Iterator[Foreseen]:
    """What the run before has and the next one does not: it began after the step that is gone back to."""
    step = planned.checkpoint.step if planned.checkpoint else 0
    before = known.runs.get(planned.parent or "")
    if before is None:
        return
    gone = (each for each in before.lr_factors if each not in planned.lr_factors)
    dropped = [f"× {each.factor:g} after {each.step:,}" for each in gone]
    dropped += [each for each in before.settings if each not in planned.settings]
    dropped += [
        f"the gap of batches {each.first:,} to {each.last:,}" for each in before.skips if each not in planned.skips
    ]
    dropped += [f"the data since step {each.step:,}" for each in before.data if each not in planned.data]
    if dropped:
        rest = f"{', '.join(dropped)}: later than step {step:,} (--keep-later keeps it)"
        yield thing("dropped", "drop", rest, {"after_step": step, "dropped": dropped})


def _rate(state: State, factors: Sequence[LrFactor], settings: tuple[str, ...], step: int) -> str:
    """`0.75 × the schedule from step 101 on (4.5e-05 there), then 0.58 × the schedule from step 196 on (…)`."""
    known = baseline(state)
    schedule = with_settings(*known, settings)[0] if known is not None else None
    parts: list[str] = []
    for start in sorted({step, *(each.step for each in factors if each.step > step)}):
        scale = math.prod(each.factor for each in factors if each.step <= start)
        lr = expected_lr(schedule, factors, start + 1) if schedule is not None else None
        there = f" ({lr:.6g} there)" if lr is not None else ""
        parts.append(f"{scale:.6g} × the schedule from step {start + 1} on{there}")
    return ", then ".join(parts)


def _rate_from_here(run: Run, change: e.ChangeRequested) -> str:
    """The same for a change that begins after one more checkpoint, whose step is not known yet."""
    if change.lr is not None:
        return f"with the learning rate {change.lr:g} at the update after it, then by the schedule"
    present = math.prod(each.factor for each in run.lr_factors)
    scale = present * (change.lr_factor or 1.0)
    return f"with the learning rate {scale:.6g} × the schedule from there on; it is {present:.6g} × now"
