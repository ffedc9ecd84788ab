"""How far a build is: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from trainer.console import say

_WIDTH = 30
_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Told of work done, tells people; says nothing of what takes no time.

    Args:
        name: of what is being built.
        total: bytes of text.
    """

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._bytes = self._tokens = 0
        self._terminal = sys.stderr.isatty()
        self._begin = self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal:
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._terminal:
            self._draw()
            say("", sys.stderr)
        elif kind is None and time.monotonic() - self._begin >= _SECONDS_BETWEEN_LINES:
            say(self._line(), sys.stderr)

    def add(self, size: int, tokens: int) -> None:
        """Another ``size`` bytes of text are done, and became ``tokens``."""
        self._bytes += size
        self._tokens += tokens
        now = time.monotonic()
        if now - self._told >= (_SECONDS_BETWEEN_DRAWINGS if self._terminal else _SECONDS_BETWEEN_LINES):
            self._told = now
            if self._terminal:
                self._draw()
            else:
                say(self._line(), sys.stderr)

    def say(self, text: str) -> None:
        """A line for the log, above the bar."""
        if self._terminal:
            say(f"\r\x1b[K{text}", sys.stderr)
            self._draw()
        else:
            say(text, sys.stderr)

    def _draw(self) -> None:
        done = round(_WIDTH * self._bytes / max(1, self._total))
        bar = "█" * done + "░" * (_WIDTH - done)
        sys.stderr.write(f"\r\x1b[K{bar} {self._line()}")
        sys.stderr.flush()

    def _line(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._begin)
        share = self._bytes / max(1, self._total)
        left = seconds / share - seconds if share else 0.0
        rate = self._tokens / seconds
        times = f"{left / 60:.0f} min left" if share < 1 else f"{seconds / 60:.1f} min"
        return (
            f"{self._name}: {share:4.0%} of {self._total / 1e6:,.0f} MB, {self._tokens:,} tokens, "
            f"{rate:,.0f}/s, {times}"
        )
