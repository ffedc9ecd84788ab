"""How long without a line is too long: twice the longest gap of the last 64, at least 30 s.

A gap is the time between two looks that each found new lines. A program that buffers its output writes 4 or 8 KiB at
once, so the gaps are those of the buffer, and patience is learned from them. Lines from before the watch began have no
time of their own. What they say of the time that an update takes gives the first patience, but no hang.
"""

from __future__ import annotations

from collections import deque

from opt_ops.core.detect.hang import HangRule

_GAPS = 64
_BUFFER = 8192  # bytes that a program without PYTHONUNBUFFERED may hold back (glibc: 4096, Python: 8192)
_BLOCK = 4000  # bytes: so many at once, as the first that is seen to come, may be a block of such a buffer


class Silence:
    """Learns the gaps between lines of all logs of a job. Times are monotonic seconds."""

    def __init__(self, rule: HangRule, now: float) -> None:
        self._rule = rule
        self._gaps: deque[float] = deque(maxlen=_GAPS)
        self._prior: float | None = None
        """The longest gap that lines from before the watch began let expect; None: they let expect none."""
        self._since = now
        self._live = False  # whether lines have come since the watch began
        self.longest_seen = 0.0

    def expect(self, line_seconds: float, line_bytes: float) -> None:
        """Lines from before the watch began: how long a line takes at most, and how many bytes it has."""
        buffered = line_seconds * _BUFFER / max(1.0, line_bytes)
        self._prior = max(self._prior or 0.0, line_seconds, min(buffered, self._rule.startup_seconds))

    def heard(self, now: float, size: int) -> None:
        """Lines have come, `size` bytes since the look before."""
        gap = now - self._since
        self._since = now
        if self._live or size < _BLOCK:
            self._gaps.append(gap)
        self._live = True

    def rest(self, now: float) -> None:
        """Nothing can come now, as while the job waits for nodes: the time does not count."""
        self._since = now

    def seconds(self, now: float) -> float:
        """Since the last line, or since the watch began."""
        return now - self._since

    @property
    def patience(self) -> float:
        """Seconds without a line after which the job counts as hung."""
        known = [*self._gaps, *([self._prior] if self._prior is not None and len(self._gaps) < 3 else [])]
        if not known:
            return self._rule.startup_seconds
        return max(self._rule.floor_seconds, self._rule.multiple * max(known))

    def too_long(self, now: float) -> bool:
        """Whether no line has come for too long."""
        return self.seconds(now) > self.patience
