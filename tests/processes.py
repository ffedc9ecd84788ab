"""The processes of a test run: each has its mark in the environment, so that none is left behind.

Fixtures end what they start. This is for what they cannot: a run that is interrupted or killed, a worker of
pytest-xdist that does not leave in time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MARK = "OPT_OPS_TEST_RUN"


def mark() -> None:
    """Mark this process as the run that everything belongs to that it starts from now on."""
    os.environ[MARK] = name(os.getpid())


def name(pid: int) -> str:
    """A process's id and start time: the same id may be another process later. Empty: there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return f"{pid}.{stat.rpartition(')')[2].split()[19]}"


def of(run: str) -> list[int]:
    """The processes of a run, but not this one."""
    return [pid for pid, its in _marked() if its == run]


def end_mine() -> None:
    """End all processes of this run."""
    end(os.environ[MARK])


def end(run: str) -> None:
    """End all processes of a run."""
    _end(lambda its: its == run)


def end_orphans() -> None:
    """End the processes of earlier runs that were killed."""
    _end(lambda run: name(int(run.partition(".")[0])) != run)


def _marked() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = (entry / "environ").read_bytes().split(b"\0")
            run = next((word.partition(b"=")[2] for word in words if word.startswith(f"{MARK}=".encode())), b"")
            if run and int(entry.name) != os.getpid():
                yield int(entry.name), run.decode()


def _end(wanted: Callable[[str], bool]) -> None:
    deadline = time.monotonic() + 30  # then they are stuck in the kernel, which is not ours to mend
    while (found := [pid for pid, run in _marked() if wanted(run)]) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
