"""Lines for the log."""

import contextlib
import sys
from typing import TextIO


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line, to stdout by default. A line that cannot be written, as on a full disk, is dropped."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
