"""Lines for people and programs, which must never end the training that they tell of."""

import contextlib
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line to the log (stdout unless told). One that cannot be written, as on a full disk, is lost."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)
