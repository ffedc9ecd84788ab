"""Ranks and what they started: everything of an attempt ends on this node, also what outlives its rank.

A rank leads a process group of its own. Its number stays ours as long as the rank is not reaped, so the group can be
signalled also when the rank is dead. Children that left the group are known by the environment that they inherited.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from opt_ops.contract import environment
from opt_ops.node.log import log

WELL_SECONDS = 5.0  # for what is left of ranks that all ended well, and to wait for the end of earlier attempts
STUCK_SECONDS = 60.0  # a process in an uninterruptible call ends when the call returns, or never

_PR_SET_PDEATHSIG = 1  # prctl(2)


class RankProcess:
    """A rank: the leader of its process group. It is not reaped before `release`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._code: int | None = None
        self._reaped = False

    @property
    def pid(self) -> int:
        """Its number, which is its group's and its session's, too."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """How it ended: its exit code, or minus the number of the signal; None while it runs."""
        if self._code is None:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self._code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self._code

    @property
    def released(self) -> bool:
        """Whether it is reaped."""
        return self._reaped

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.code is None

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the rank and to all that is in its group, also when the rank is dead."""
        if not self._reaped:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def release(self) -> None:
        """Reap it, after nothing of its group is left: the kernel may then give its number to another process."""
        if not self._reaped and self.code is not None:
            self._process.wait()
            self._reaped = True


class CleanUp:
    """Ends what ranks leave behind: members of their groups and sessions, and whatever carries the attempt's variables.

    Attributes:
        done: Whether nothing of the attempt is left on this node.
    """

    def __init__(self, node: str, attempt: Path) -> None:
        self._marked = {environment.NODE: node, environment.ATTEMPT: str(attempt)}
        self._over_at: float | None = None
        self.done = False

    def look(self, ranks: Mapping[int, RankProcess], ending: bool) -> None:
        """Kill what is left. `ranks`: by their numbers; `ending`: the attempt is being ended.

        What a rank leaves that failed is killed at once: it may hold memory of a GPU. If all ranks ended well, it has
        some seconds more, to write what it has.
        """
        ended = {rank: process for rank, process in ranks.items() if not process.alive}
        if self.done or (ranks and not ended):
            return
        over = len(ended) == len(ranks)
        if over and self._over_at is None:
            self._over_at = time.monotonic()
        waited = 0.0 if self._over_at is None else time.monotonic() - self._over_at
        failed = {rank: process for rank, process in ended.items() if process.code != 0 or ending}
        if over and (failed or not ranks or waited > WELL_SECONDS):
            self._kill(left_over({process.pid for process in ended.values()}, self._marked), waited)
        elif over:
            self.done = not left_over({process.pid for process in ended.values()}, self._marked)
        elif unreleased := {rank: process for rank, process in failed.items() if not process.released}:
            numbers = {str(rank) for rank in unreleased}
            left = left_over({process.pid for process in unreleased.values()}, self._marked, numbers)
            kill(left)
            if not left:
                _release(unreleased)
        if self.done:
            _release(ended)

    def _kill(self, left: list[int], waited: float) -> None:
        kill(left)
        if left and waited > STUCK_SECONDS:
            log(f"processes {', '.join(map(str, left))} do not end after SIGKILL; they are left behind")
        self.done = not left or waited > STUCK_SECONDS


def _release(ranks: Mapping[int, RankProcess]) -> None:
    for process in ranks.values():
        process.release()


def end_earlier(node: str, lineage: Path, attempt: Path) -> None:
    """Kill what earlier attempts of the lineage left on this node, if their agent could not. Waits some seconds."""
    deadline = time.monotonic() + WELL_SECONDS
    while (left := _of_earlier(node, lineage, attempt)) and time.monotonic() < deadline:
        kill(left)
        time.sleep(0.05)
    if left:
        log(f"processes {', '.join(map(str, left))} of earlier attempts do not end after SIGKILL")


def _of_earlier(node: str, lineage: Path, attempt: Path) -> list[int]:
    mine, any_of = f"{environment.ATTEMPT}={attempt}".encode(), f"{environment.ATTEMPT}={lineage}/".encode()
    name = f"{environment.NODE}={node}".encode()
    return [
        pid
        for pid, _ in _processes(set())
        if name in (found := _environment(pid)) and mine not in found and any(v.startswith(any_of) for v in found)
    ]


def left_over(groups: set[int], marked: Mapping[str, str], ranks: set[str] | None = None) -> list[int]:
    """The processes that outlive their ranks, without those that have ended already.

    Args:
        groups: The numbers of the ranks. Who is in the group or session of one counts.
        marked: Who carries all of these variables counts, too,
        ranks: and one of these as its RANK; None: any.
    """
    wanted = {f"{name}={value}".encode() for name, value in marked.items()}
    numbers = None if ranks is None else {f"{environment.RANK}={rank}".encode() for rank in ranks}
    return [
        pid
        for pid, owned in _processes(groups)
        if owned or (wanted <= (found := _environment(pid)) and (numbers is None or numbers & found))
    ]


def kill(pids: list[int]) -> None:
    """Kill processes that `left_over` has just found."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _processes(groups: set[int]) -> Iterator[tuple[int, bool]]:
    """All processes that run, without this one and the ranks, each with whether a group or session of ours has it."""
    for folder in Path("/proc").iterdir():
        name = folder.name
        if not name.isdigit() or int(name) == os.getpid() or int(name) in groups:
            continue
        try:
            about = (folder / "stat").read_bytes()
        except OSError:  # it has ended
            continue
        state, _, group, session = about[about.rindex(b")") + 2 :].split()[:4]  # proc(5)
        if state not in (b"Z", b"X"):
            yield int(name), int(group) in groups or int(session) in groups


def _environment(pid: int) -> set[bytes]:
    """The variables that a process was started with; empty if it is another user's, or has ended."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def die_with_parent(parent: int) -> None:
    """Run in a new process: let the kernel kill it when the process that started it, `parent`, dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before this request
        os.kill(os.getpid(), signal.SIGKILL)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)
