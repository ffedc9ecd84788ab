"""The lines of a rank's log that name a cause, picked out while the log is read, in bounded memory.

An error that training survived is no cause: a line that reports a step makes all earlier lines *stale*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from opt_ops.core.failures.families import Family, Weight, find

LONGEST = 400  # characters of a line that are kept
_FIRST, _LAST = 3, 1  # lines of each weight that are kept
_STALE = 4
_LONG_LINE, _OVERLAP = 4096, LONGEST  # bytes: longer lines are looked at in pieces that overlap
_LINE_ENDS = (b"\n", b"\r")

_STEP = re.compile(
    r"^\W*(?:\[[^\]]{0,60}\]\W*|\d[\d:,.T/ -]*\W+|(?:INFO|rank ?\d+|\w+\.\w+)\b\W+){0,4}"
    r"(?:global[ _])?(?:step|iteration|iter|update|num_updates|batch)s?\b\W{0,20}(\d{1,12})\b|"
    r"\{[^{}]{0,300}\"(?:step|num_updates|iteration|global_step)\": ?\"?(\d{1,12})\b"
)
"""How trainers report a step."""

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)?|[@-_])|\x9b[0-?]*[ -/]*[@-~]")


_VARIES = re.compile(r"\[[^\]]*\d[^\]]*\]:?|0x[0-9a-fA-F]+|\S*/\S*|[0-9a-fA-F]{8,}|\d+")


@dataclass(frozen=True, slots=True)
class CauseLine:
    """A line that names a cause.

    Attributes:
        text: One line without control characters; untrusted.
        at: When it was read, in seconds since the epoch; None if that is not known.
        step: The last step that the same log reported before; None if it reported none.
        stale: Whether the log reported a step after it.
    """

    text: str
    at: float | None = None
    step: int | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A line that names a cause, with its family."""

    line: CauseLine
    family: Family


class CauseLines:
    """Picks out the lines that name a cause: of each weight the first ones and the last."""

    def __init__(self) -> None:
        self._fresh: dict[Weight, list[tuple[int, Found]]] = {}
        self._stale: list[Found] = []
        self._rest = b""
        self._number = 0
        self._step: int | None = None

    def add(self, line: str, at: float | None = None) -> None:
        """Look at the next line of the log. `at`: when it was read."""
        family = find(line)
        if family is not None:
            self._number += 1
            kept = self._fresh.setdefault(family.weight, [])
            if len(kept) == _FIRST + _LAST:
                kept.pop()
            text = _around(clean(line), family)
            kept.append((self._number, Found(CauseLine(text, at, self._step), family)))
        elif step := _STEP.match(line):
            self._step = int(step[1] or step[2])
            self._survived()

    def add_all(self, lines: Iterable[str], at: float | None = None) -> CauseLines:
        """Look at several lines."""
        for line in lines:
            self.add(line, at)
        return self

    def feed(self, data: bytes, at: float | None = None) -> CauseLines:
        """Look at the next bytes of the log. An unfinished line waits for its end, or until `finish`."""
        lines = (self._rest + data).splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith(_LINE_ENDS) else b""
        for line in lines:
            self._add_bytes(line, at)
        while len(self._rest) > _LONG_LINE:  # binary data, or one line without end
            self._add_bytes(self._rest[:_LONG_LINE], at)
            self._rest = self._rest[_LONG_LINE - _OVERLAP :]
        return self

    def finish(self, at: float | None = None) -> CauseLines:
        """Take an unfinished last line as it is: the log has ended."""
        rest, self._rest = self._rest, b""
        self._add_bytes(rest, at)
        return self

    def _add_bytes(self, line: bytes, at: float | None) -> None:
        for start in range(0, len(line), _LONG_LINE - _OVERLAP):
            self.add(line[start : start + _LONG_LINE].decode(errors="replace"), at)

    def _survived(self) -> None:
        if self._fresh:
            before = [
                replace(found, line=replace(found.line, stale=True)) for found in self.found if not found.line.stale
            ]
            self._stale = [*self._stale, *before][-_STALE:]
            self._fresh = {}

    @property
    def found(self) -> list[Found]:
        """What is kept, in the order of the log; stale lines first."""
        fresh = sorted((each for kept in self._fresh.values() for each in kept), key=lambda each: each[0])
        return [*self._stale, *(found for _, found in fresh)]


def clean(line: str) -> str:
    """Untrusted text as one line: escape sequences are removed, other control characters become spaces."""
    return "".join(c if c.isprintable() else " " for c in _ESCAPE.sub("", line)).strip()


def fingerprint(line: str) -> str:
    """What two lines of the same error have in common: no numbers, addresses, paths, or prefixes of ranks."""
    return " ".join(_VARIES.sub(" ", line).split()).lower()


def _around(line: str, family: Family) -> str:
    """At most `LONGEST` characters: the beginning, or what surrounds the match in a longer line."""
    if len(line) <= LONGEST:
        return line
    match = family.pattern.search(line)
    start = 0 if match is None or match.end() < LONGEST else match.start() - LONGEST // 4
    return ("…" if start else "") + line[start : start + LONGEST - 2] + "…"
