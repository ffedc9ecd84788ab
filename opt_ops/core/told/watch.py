"""Sentences of replaced ranks, of probes, and of what the watch itself could not do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.events.probes import ProbeKind
from opt_ops.core.state import in_place
from opt_ops.core.state.model import State
from opt_ops.core.told import words
from opt_ops.core.told.phrase import Forms, acts, because, count, cut, listed, name, plain, seen

_NAMED = 4  # nodes of a generation that are named


def _members(event: e.MembersIntended, known: State | None) -> Forms:
    where = f" on {listed(event.nodes)}" if len(event.nodes) <= _NAMED else ""
    start = "starts" if len(event.new) == 1 else "start"
    new = f"{in_place.ranks(event.new)} {start}, all others stay" if event.new else "all ranks stay"
    rest = f"with {name(event.attempt)} as generation {event.generation}{where}: {new}"
    return Forms(f"{name(event.attempt)} goes on as generation {event.generation}{where}: {new}", "go on", rest)


def _joined(event: e.MembersJoined, known: State | None) -> Forms:
    again = f", {count(event.repeated, 'step')} made again" if event.repeated else ""
    kept = f", {event.kept:,} {_are(event.kept)} the same" if event.kept is not None else ""
    of = f"{name(event.attempt)}, generation {event.generation}"
    return seen(f"all ranks of {of}, hold step {event.step:,}{again}{kept}")


def _are(processes: int) -> str:
    return "process is" if processes == 1 else "processes are"


def _failed(event: e.MembersFailed, known: State | None) -> Forms:
    what = f"generation {event.generation} of {name(event.attempt)}"
    why = because(event.why)
    return Forms(f"{what} was given up{why}", "replace", f"no ranks in place{why}")


def _standby(event: e.StandbySeen, known: State | None) -> Forms:
    return seen(f"{name(event.node)}: {in_place.standby(event.ready)}")


_PROBES: Mapping[ProbeKind, str] = {
    ProbeKind.SAME_DATA: "with the same data",
    ProbeKind.OTHER_DATA: "without the batches in question",
    ProbeKind.LOWER_LR: "at a lower learning rate",
}


def _probes(event: e.ProbesIntended, known: State | None) -> Forms:
    where = f"{count(len(event.probes), 'probe')} on {listed(each.node for each in event.probes)}"
    steps = f"from step {event.checkpoint.step:,} to {event.last_step:,}"
    return acts("train", f"{where} {steps} before it decides about {name(event.incident)}")


def _probe(event: e.ProbeEnded, known: State | None) -> Forms:
    at = f" at step {event.step:,}" if event.step is not None else ""
    showed = {True: f"spiked{at}", False: "did not spike", None: "showed nothing"}[event.spiked]
    return seen(f"{name(event.incident)}: the probe {_PROBES[event.probe]} {showed}")


def _judged(event: e.ProbesJudged, known: State | None) -> Forms:
    likely = f": likely {words.cause(event.causes[0].cause)} ({event.causes[0].confidence:.0%})" if event.causes else ""
    text = f"{name(event.incident)}: the wait for probes is over{likely}"
    return Forms(text, "end", f"the wait for probes of {name(event.incident)}{likely}")


def _left_out(event: e.InputLeftOut, known: State | None) -> Forms:
    return seen(plain(event.text))


def _watcher(event: e.WatcherFailed, known: State | None) -> Forms:
    return seen(f"a part of the watch fails: {cut(plain(event.watcher), 60)}: {plain(event.why)}")


def _recovered(event: e.WatcherRecovered, known: State | None) -> Forms:
    return seen(f"a part of the watch works again: {plain(event.watcher)}")


RULES: Mapping[type[e.Event], Callable[[Any, State | None], Forms]] = {
    e.MembersIntended: _members,
    e.MembersJoined: _joined,
    e.MembersFailed: _failed,
    e.StandbySeen: _standby,
    e.ProbesIntended: _probes,
    e.ProbeEnded: _probe,
    e.ProbesJudged: _judged,
    e.InputLeftOut: _left_out,
    e.WatcherFailed: _watcher,
    e.WatcherRecovered: _recovered,
}
