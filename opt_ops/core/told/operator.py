"""Sentences of what people ask for, and of starts of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.data import change_of, data_now, shares
from opt_ops.core.state.model import State
from opt_ops.core.text import duration
from opt_ops.core.told.phrase import Forms, acts, after, count, cut, figure, name, number_in, plain, quoted, seen
from opt_ops.core.values import Driver, Fault, PlannedChange

_SETTINGS = 3  # that are named; more are counted
_DATA = 80  # characters of what changes of the data


def _daemon(event: e.DaemonStarted, known: State | None) -> Forms:
    if known is not None and known.ended:  # which no daemon watches, until somebody asks for something
        return seen(f"the daemon on {name(event.host)}, pid {event.pid}, takes up the ended lineage")
    gap = f", after {duration(event.blind_seconds)} without one" if event.blind_seconds is not None else ""
    return seen(f"the daemon watches from {name(event.host)}, pid {event.pid}{gap}")


def _lineage(event: e.LineageStarted, known: State | None) -> Forms:
    settings = f" with {_settings(event.settings)}" if event.settings else ""
    spares = f" and {count(event.shape.spares, 'spare')}" if event.shape.spares else ""
    what = f"{name(event.recipe)}{settings} on {count(event.shape.nodes, 'node')}{spares}"
    if event.parent is not None:
        what = f"a fork of {name(event.parent.run)} at step {event.parent.step:,}: {what}"
        return Forms(f"{name(event.author)} asked for {what}{after(': ', event.reason)}", "train", what)
    return Forms(f"{name(event.author)} asked for {what}", "train", what)


def _settings(settings: Sequence[str]) -> str:
    if len(settings) > _SETTINGS:
        return count(len(settings), "setting")
    return ", ".join(map(name, settings))


def _stop(event: e.StopRequested, known: State | None) -> Forms:
    why = after(": ", event.reason)
    return Forms(f"{name(event.author)} asked to stop for good{why}", "stop", "for good")


def _pause(event: e.PauseRequested, known: State | None) -> Forms:
    what = f"and {'keep' if event.keep_nodes else 'give back'} the nodes"
    return Forms(f"{name(event.author)} asked to pause, {what}{after(': ', event.reason)}", "pause", what)


def _resume(event: e.ResumeRequested, known: State | None) -> Forms:
    past = f"{name(event.author)} asked to go on{after(': ', event.reason)}"
    return Forms(past, "go on", "from the newest good checkpoint")


def _change(event: e.ChangeRequested, known: State | None) -> Forms:
    changes = [
        *([f"the learning rate × {figure(event.lr_factor)}"] if event.lr_factor is not None else []),
        *([f"the learning rate {figure(event.lr, 6)}"] if event.lr is not None else []),
        *([_settings(event.settings)] if event.settings else []),
        *([_data(event, known)] if event.data else []),
    ]
    with_ = f" with {' and '.join(changes)}" if changes else ""
    skipped = f", leaving out {count(event.skip_batches, 'batch', 'batches')}" if event.skip_batches else ""
    if event.to_step is None:
        verb, what = "go on", f"{with_ or ' in a new run'}{skipped}".removeprefix(" ")
    else:
        verb, what = "go back", f"to {event.to_step:,}{with_}{skipped}"
    return Forms(f"{name(event.author)} asked to {verb} {what}{after(': ', event.reason)}", verb, what)


def _data(event: e.ChangeRequested, known: State | None) -> str:
    """`other data: + code 10 %`; what changes is known from the state alone."""
    if known is None or known.run is None or known.lineage is None:
        return f"other data: {cut(plain(', '.join(shares(event.data))), _DATA)}"
    return f"other data: {cut(plain(change_of(data_now(known, known.run), event.data)), _DATA)}"


def _declared(event: e.ChangesDeclared, known: State | None) -> Forms:
    what = f"{planned(event.planned)}; the loss detectors learn again there"
    past = f"{name(event.author)} plans {planned(event.planned)}{after(': ', event.reason)}"
    return Forms(past, "expect", what)


def planned(changes: Sequence[PlannedChange]) -> str:
    """`a change at step 48,000 (“stage b”)`; of several, their steps."""
    if len(changes) == 1:
        return f"a change at step {changes[0].step:,}{_what(changes[0])}"
    steps = ", ".join(f"{each.step:,}{_what(each)}" for each in changes[:_SETTINGS])
    more = f" and {len(changes) - _SETTINGS} more" if len(changes) > _SETTINGS else ""
    return f"{count(len(changes), 'change')} at steps {steps}{more}" if changes else "no change"


def _what(change: PlannedChange) -> str:
    return f" ({quoted(change.what, 30)})" if change.what.strip() else ""


def _driver(event: e.DriverChanged, known: State | None) -> Forms:
    why = after(": ", event.reason)
    match event.driver:
        case Driver.OPERATOR:
            return Forms(f"{name(event.author)} drives{why}", "act", "on requests only, until you hand back")
        case Driver.SHADOW:
            return seen(f"another launcher drives, opt-ops only watches{why}")
        case Driver.ASK:
            rest = "before it restarts or rolls back"
            return Forms(f"opt-ops asks {rest}, as {name(event.author)} asked{why}", "ask", rest)
        case Driver.DAEMON:
            return Forms(f"opt-ops drives again, as {name(event.author)} asked{why}", "drive", "again")


def _allowed(event: e.NodeAllowed, known: State | None) -> Forms:
    what = f"{name(event.node)} run again"
    return Forms(f"{name(event.author)} lets {what}{after(': ', event.reason)}", "let", what)


def _note(event: e.NoteAdded, known: State | None) -> Forms:
    correction = " (correction)" if event.correction else ""
    return Forms(
        f"{name(event.author)} on {name(event.target)}: {quoted(event.text)}{correction}",
        "write",
        f"into the logbook, on {name(event.target)}: {quoted(event.text)}",
    )


def _drill(event: e.DrillRequested, known: State | None) -> Forms:
    what = drill(event.fault, event.arguments)
    where = f" in {name(event.attempt)}" if event.attempt else ""
    return Forms(f"DRILL {name(event.drill)}: {what}", "inject", f"a fault{where}: {what}")


def drill(fault: Fault, arguments: Mapping[str, Any]) -> str:
    """What a drill does: `rank 1 is killed`."""

    def given(key: str, missing: str = "?") -> str:
        number = number_in(arguments, key)
        value = arguments.get(key)
        return figure(number, 12) if number is not None else name(value) if isinstance(value, str) else missing

    match fault:
        case Fault.LR:
            steps = f"{given('updates')} updates from step {given('from_step')}"
            return f"learning rate × {given('factor')} for {steps}"
        case Fault.NAN:
            return f"the loss is made NaN at step {given('from_step')}"
        case Fault.KILL_RANK:
            place = f" in the part {given('in_step')} of a step" if arguments.get("in_step") else ""
            return f"rank {given('rank')} is killed{place}"
        case Fault.KILL_NODE:
            return f"all ranks on {given('node')} are killed"
        case Fault.KILL_PAIR:
            return "a rank and the one that keeps its copy are killed"
        case Fault.SLOW_STANDBY:
            return f"warm processes wait {given('seconds')} s before they join"
        case Fault.FLIP_BIT:
            return f"a bit of the weights of rank {given('rank')} is flipped"
        case Fault.HANG:
            return f"rank {given('rank')} is made to hang"
        case Fault.XID:
            return f"Xid {given('xid')} in the kernel log of {given('node')}"
        case Fault.KILL_DAEMON:
            return "the daemon is killed"


def _drill_done(event: e.DrillDone, known: State | None) -> Forms:
    return seen(f"DRILL {name(event.drill)} is in")


def _refused(event: e.RequestRefused, known: State | None) -> Forms:
    what = f"what {name(event.author)} asked ({cut(plain(event.verb).replace('_', ' '), 30)}): {plain(event.why)}"
    return acts("refuse", what, past="refused")


RULES: Mapping[type[e.Event], Callable[[Any, State | None], Forms]] = {
    e.DaemonStarted: _daemon,
    e.LineageStarted: _lineage,
    e.StopRequested: _stop,
    e.PauseRequested: _pause,
    e.ResumeRequested: _resume,
    e.ChangeRequested: _change,
    e.ChangesDeclared: _declared,
    e.DriverChanged: _driver,
    e.NodeAllowed: _allowed,
    e.NoteAdded: _note,
    e.DrillRequested: _drill,
    e.DrillDone: _drill_done,
    e.RequestRefused: _refused,
}
