"""The text of `--dry-run`: what the daemon would do about a request, by its own rules, one sentence an event."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opt_ops.config import Config
from opt_ops.core import events as e
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.schedule import expected_lr
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import State
from opt_ops.core.text import printable
from opt_ops.core.values import Action, Driver, LrFactor
from opt_ops.supervise import supervisor
from opt_ops.supervise.site_policy import site_policy


def preview(state: State, event: e.Event, now: float, config: Config) -> Iterator[str]:
    """What would follow from an event until the world answers: the real decisions, made on a copy of the state.

    Raises:
        PlaybookError: a playbook page is malformed.
    """
    for coming in supervisor.preview(state, event, now, site_policy(config)):
        yield printable(f"Would {_sentence(coming)}.")
        if isinstance(coming, e.AttemptIntended) and coming.checkpoint is None and (weights := _first_weights(state)):
            yield printable(f"Would begin with the weights of {weights}.")
        if isinstance(coming, e.RunPlanned):
            yield from map(printable, _settings(state, coming))
        elif isinstance(coming, e.ChangeRequested) and coming.to_step is None and state.run is not None:
            yield printable(_rate_from_here(state.run, coming))


def _first_weights(state: State) -> str | None:
    return state.lineage.init_from if state.lineage is not None else None


def _sentence(event: e.Event) -> str:
    known = _SENTENCES.get(type(event), "journal " + e.kind_of(event))
    return known.format(event=event) if isinstance(known, str) else known(event)


def _pause(event: e.PauseRequested) -> str:
    return f"pause after one more checkpoint and {'keep' if event.keep_nodes else 'release'} the nodes"


def _change(event: e.ChangeRequested) -> str:
    where = "after one more checkpoint" if event.to_step is None else f"from step {event.to_step:,} or before"
    return f"start the next run {where}{_changes(event.lr_factor, event.settings, event.skip_batches, event.lr)}"


def _declared(event: e.ChangesDeclared) -> str:
    changes = ", ".join(f"step {each.step:,}{f' ({each.what})' if each.what else ''}" for each in event.planned)
    return f"declare as planned: {changes}; the loss detectors learn again there"


def _recovery(event: e.RecoveryDecided) -> str:
    step = f" to step {event.checkpoint.step:,}" if event.checkpoint and event.action is Action.ROLLBACK else ""
    exclude = f", exclude {', '.join(event.exclude)}" if event.exclude else ""
    changes = _changes(event.lr_factor, event.settings, event.skip_batches)
    if event.action is Action.REPLACE_RANKS:
        step = f" {in_place.ranks(event.ranks)} while all others keep running"
    return f"decide for incident {event.incident}: {event.action}{step}{exclude}{changes} ({event.why})"


def _members(event: e.MembersIntended) -> str:
    start = f"{in_place.ranks(event.new)} {'starts' if len(event.new) == 1 else 'start'}"
    return f"order generation {event.generation} of {event.attempt}: {start}, all others stay"


def _changes(
    factor: float | None, settings: tuple[str, ...], skip_batches: int, learning_rate: float | None = None
) -> str:
    parts = [
        *([f"learning rate × {factor:g}"] if factor is not None else []),
        *([f"learning rate {learning_rate:g}"] if learning_rate is not None else []),
        *settings,
        *([f"{skip_batches} batches skipped"] if skip_batches else []),
    ]
    return "".join(f", {part}" for part in parts)


def _settings(state: State, planned: e.RunPlanned) -> Iterator[str]:
    """What the run trains under: the learning rate with every step at which it changes, and what is dropped."""
    step = planned.checkpoint.step if planned.checkpoint else 0
    yield f"Would train with the learning rate {_rate(state, planned.lr_factors, planned.settings, step)}."
    before = state.runs.get(planned.parent or "")
    if before is None:
        return
    gone = (each for each in before.lr_factors if each not in planned.lr_factors)
    dropped = [f"× {each.factor:g} after step {each.step}" for each in gone]
    dropped += [each for each in before.settings if each not in planned.settings]
    dropped += [f"skipped batches {each.first} to {each.last}" for each in before.skips if each not in planned.skips]
    if dropped:
        yield f"Would drop what begins after step {step} (--keep-later keeps it): {', '.join(dropped)}."


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
        return f"Would train with the learning rate {change.lr:g} at the update after it, then follow the schedule."
    present = math.prod(each.factor for each in run.lr_factors)
    scale = present * (change.lr_factor or 1.0)
    return f"Would train with the learning rate {scale:.6g} × the schedule from there on; it is {present:.6g} × now."


def _attempt(event: e.AttemptIntended) -> str:
    start = f"step {event.checkpoint.step:,}" if event.checkpoint else "step 0"
    return f"start attempt {event.attempt} at {start} on {', '.join(event.nodes)}"


def _drill(event: e.DrillRequested) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in event.arguments.items())
    where = f" into attempt {event.attempt}" if event.attempt else ""
    return f"inject the fault {event.fault}{where}{f' ({arguments})' if arguments else ''}"


def _driver(event: e.DriverChanged) -> str:
    if event.driver is Driver.OPERATOR:
        return "switch to advisory mode: the daemon acts on requests only"
    return "return control to the daemon"


_SENTENCES: Mapping[type[e.Event], str | Callable[[Any], str]] = {
    e.StopRequested: "stop the lineage for good",
    e.PauseRequested: _pause,
    e.ResumeRequested: "resume from the newest good checkpoint",
    e.ChangeRequested: _change,
    e.ChangesDeclared: _declared,
    e.DriverChanged: _driver,
    e.NodeAllowed: "allow attempts on {event.node} again",
    e.NodeExcluded: "exclude {event.node}: no attempt starts there",
    e.DrainIntended: "ask the scheduler to drain {event.node}",
    e.DrillRequested: _drill,
    e.IncidentOpened: "open incident {event.incident}: {event.cause}",
    e.RecoveryDecided: _recovery,
    e.IncidentClosed: "close incident {event.incident}",
    e.RunPlanned: "plan run {event.run}: {event.cause}",
    e.SizeDecided: "train on {event.nodes} nodes: {event.why}",
    e.AllocationIntended: "request nodes from the scheduler ({event.nodes})",
    e.ReleaseIntended: "release the nodes of allocation {event.allocation}",
    e.AttemptIntended: _attempt,
    e.MembersIntended: _members,
    e.MembersFailed: "replace no ranks in place: {event.why}",
    e.LeaveIntended: "save a checkpoint, then stop attempt {event.attempt}",
    e.StopIntended: "stop attempt {event.attempt}",
    e.LineagePaused: "mark the lineage PAUSED",
    e.LineageHalted: "halt the lineage: {event.why}",
    e.LineageCancelled: "mark the lineage CANCELLED",
    e.LineageCompleted: "mark the lineage COMPLETED at step {event.step}",
    e.AlertIntended: "send an alert ({event.severity}): {event.title}",
}
