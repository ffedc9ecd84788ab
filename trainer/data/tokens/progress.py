"""Show the progress of a build: a bar on a terminal, one line per minute elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from trainer.console import print_line

_WIDTH = 30
_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_BETWEEN_LINES = 60.0


class BuildProgress:
    """Shows the progress of one build. Without a terminal, a build of less than a minute shows nothing.

    Args:
        name: of the corpus.
        total: bytes of text.
    """

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._bytes = self._tokens = 0
        self._terminal = sys.stderr.isatty()
        self._begin = self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._terminal:
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._terminal:
            self._draw()
            print_line("", sys.stderr)
        elif kind is None and time.monotonic() - self._begin >= _SECONDS_BETWEEN_LINES:
            print_line(self._line(), sys.stderr)

    def add(self, size: int, tokens: int) -> None:
        """Note that ``size`` more bytes of text became ``tokens`` tokens."""
        self._bytes += size
        self._tokens += tokens
        now = time.monotonic()
        if now - self._shown >= (_SECONDS_BETWEEN_DRAWINGS if self._terminal else _SECONDS_BETWEEN_LINES):
            self._shown = now
            if self._terminal:
                self._draw()
            else:
                print_line(self._line(), sys.stderr)

    def print_line(self, text: str) -> None:
        """Print a line for the log, above the bar."""
        if self._terminal:
            print_line(f"\r\x1b[K{text}", sys.stderr)
            self._draw()
        else:
            print_line(text, sys.stderr)

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
