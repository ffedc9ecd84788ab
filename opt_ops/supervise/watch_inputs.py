"""Watches what the readers leave out: told once for each file, and again as the count grows, but never in a flood."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opt_ops.core.events import Event, InputLeftOut
from opt_ops.core.state.model import State, left_out_key
from opt_ops.ports import Clock, Inputs, LeftOut

_AGAIN_SECONDS = 10.0  # until a file is reported again, if more was left out; doubled each time
_LONGEST_SECONDS = 3600.0
_MOST = 10
"""Records that are left out, at least, before they can be the most of a file: one bad line is not another format."""
_READ_FROM_START = frozenset({"telemetry", "phases"})
"""Files that each daemon process reads from their start: their counts are not added to those of earlier processes."""


@dataclass
class _Told:
    count: int
    most: bool
    at: float
    pause: float = _AGAIN_SECONDS


class InputWatch:
    """Reports what was left out of the files of one lineage."""

    def __init__(self, inputs: Inputs, clock: Clock) -> None:
        self._inputs = inputs
        self._clock = clock
        self._before: dict[str, int] = {}
        """Records that earlier daemon processes left out, by file."""
        self._told: dict[str, _Told] = {}

    def observe(self, state: State) -> Iterator[Event]:
        """Yield an event for each file of which more was left out than the journal says."""
        now = self._clock.monotonic()
        for each in self._inputs.left_out():
            key = left_out_key(each.source, each.file)
            known = state.left_out.get(key)
            if key not in self._before:
                counted = known is not None and each.source not in _READ_FROM_START
                self._before[key] = known.count if known is not None and counted else 0
            count = self._before[key] + each.count
            most = each.count >= _MOST and each.count > each.taken
            told = self._told.get(key)
            if told is None:
                self._told[key] = _Told(known.count if known else 0, known.most if known else False, now)
                if known is None or count > known.count:
                    self._told[key].count, self._told[key].most = count, most
                    yield _event(each, count, most)
            elif (count > told.count and now - told.at >= told.pause) or (most and not told.most):
                told.pause = min(2 * told.pause, _LONGEST_SECONDS)
                told.count, told.most, told.at = count, most, now
                yield _event(each, count, most)


def _event(found: LeftOut, count: int, most: bool) -> InputLeftOut:
    return InputLeftOut(
        source=found.source,
        file=found.file,
        count=count,
        taken=found.taken,
        first=found.first,
        newest=found.newest,
        most=most,
    )
