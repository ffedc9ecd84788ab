"""Lines for people and programs, which must never end the training that they tell of."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line to the log (stdout unless told). One that cannot be written, as on a full disk, is lost."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)


class LineFile:
    """A ``*.jsonl`` file that holds whole lines only. One writer.

    A line that cannot be written, as on a full disk, is lost, and what arrived of it is taken back. The log says so
    once for each time that it happens, and once when there is room again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size = os.fstat(self._fd).st_size
        self._lost = 0

    def write(self, value: Mapping[str, Any]) -> bool:
        """Append ``value`` as a line of strict JSON, in one system call. False if it was lost."""
        line = (json.dumps(value, allow_nan=False) + "\n").encode()
        if not self._append(line):
            self._lost += 1
            return False
        if self._lost:
            say(f"{self._path} can be written again; {self._lost} lines were lost", sys.stderr)
            self._lost = 0
        return True

    def _append(self, line: bytes) -> bool:
        why = "no room for a whole line"
        try:
            if self._lost:
                os.ftruncate(self._fd, self._size)  # if it did not succeed when the line was lost
            if os.write(self._fd, line) == len(line):
                self._size += len(line)
                return True
        except OSError as error:
            why = str(error)
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._size)
        if not self._lost:
            say(f"{self._path} cannot be written, training goes on: {why}", sys.stderr)
        return False
