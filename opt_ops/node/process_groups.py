"""Ranks and what they started: everything of an attempt ends on this node, also what outlives its rank.

A rank leads a process group of its own. Its number stays ours as long as the rank is not reaped, so the group can be
signalled also when the rank is dead. Children that left the group are known by the environment that they inherited.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from opt_ops.contract import environment
from opt_ops.node.log import log

WELL_SECONDS = 5.0  # for what is left of ranks that all ended well, and to wait for the end of earlier attempts
STUCK_SECONDS = 60.0  # a process in an uninterruptible call ends when the call returns, or never

ADOPTED_SECONDS = 30.0  # after its end, an adopted process is reaped
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)


class ChildProcess(Protocol):
    """A child of this process: `subprocess.Popen`, or one that the warm process has forked."""

    @property
    def pid(self) -> int:
        """Its number."""
        ...

    def wait(self) -> int:
        """Reap it."""
        ...


class RankProcess:
    """A rank: the leader of its process group. It is not reaped before `release`.

    Args:
        process: leads a session of its own.
        members: its members file, which its environment names: by that, what it has started is known.
    """

    def __init__(self, process: ChildProcess, members: Path | None = None) -> None:
        self._process = process
        self.members = members
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

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped it: it will not hear any other but SIGKILL."""
        return self.alive and _state(self.pid) == b"T"

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

    Args:
        node: the name of the node.
        attempt: the folder of the attempt.
        members: the folder of this agent's members files. What names a file in it belongs to the process of that file.

    Attributes:
        done: Whether nothing of the attempt's ranks is left on this node.
    """

    def __init__(self, node: str, attempt: Path, members: Path) -> None:
        self._marked = {environment.NODE: node, environment.ATTEMPT: str(attempt)}
        self._members = members
        self._over_at: float | None = None
        self.done = False

    def look(self, processes: Sequence[RankProcess], ending: bool) -> None:
        """Kill what is left. `processes`: all that ever ran; `ending`: the attempt is being ended.

        What a rank leaves that failed is killed at once: it may hold memory of a GPU. If all ranks ended well, it has
        some seconds more, to write what it has.
        """
        ended = [process for process in processes if not process.alive]
        over = len(ended) == len(processes)
        if not over:  # also if new ranks have started after all had ended
            self._over_at, self.done = None, False
        if self.done or (processes and not ended):
            return
        if over and self._over_at is None:
            self._over_at = time.monotonic()
        waited = 0.0 if self._over_at is None else time.monotonic() - self._over_at
        failed = [process for process in ended if process.code != 0 or ending]
        if over and (failed or not processes or waited > WELL_SECONDS):
            self._kill(self._left_of(ended, others=True), waited)
        elif over:
            self.done = not self._left_of(ended, others=True)
        else:
            self.release(failed)
        if self.done:
            _release(ended)

    def release(self, ended: Sequence[RankProcess]) -> None:
        """Kill what these processes have left, and reap them when nothing of it is left."""
        unreleased = [process for process in ended if not process.released]
        left = self._left_of(unreleased, others=False) if unreleased else []
        kill(left)
        if not left:
            _release(unreleased)

    def _left_of(self, ended: Sequence[RankProcess], others: bool) -> list[int]:
        """What runs of these processes; `others`: and of those that an earlier agent started."""
        theirs = {f"{environment.MEMBERS}={process.members}".encode() for process in ended}
        ours = f"{environment.MEMBERS}={self._members}/".encode()

        def counts(variables: set[bytes]) -> bool:
            return bool(theirs & variables) or (others and not any(each.startswith(ours) for each in variables))

        return left_over({process.pid for process in ended if not process.released}, self._marked, counts)

    def _kill(self, left: list[int], waited: float) -> None:
        kill(left)
        if left and waited > STUCK_SECONDS:
            log(f"processes {', '.join(map(str, left))} do not end after SIGKILL; they are left behind")
        self.done = not left or waited > STUCK_SECONDS


def _release(processes: Sequence[RankProcess]) -> None:
    for process in processes:
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


def left_over(
    groups: set[int], marked: Mapping[str, str], counts: Callable[[set[bytes]], bool] = lambda _: True
) -> list[int]:
    """The processes that outlive their ranks, without those that have ended already.

    Args:
        groups: The numbers of the ranks. Who is in the group or session of one counts.
        marked: Who carries all of these variables counts, too,
        counts: if this says so of its variables.
    """
    wanted = {f"{name}={value}".encode() for name, value in marked.items()}
    return [
        pid for pid, owned in _processes(groups) if owned or (wanted <= (found := _environment(pid)) and counts(found))
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


def _state(pid: int) -> bytes:
    """The letter of its state (proc(5), stat); empty if it has ended."""
    try:
        about = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return b""
    return about[about.rindex(b")") + 2 :][:1]


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


def adopt_orphans() -> None:
    """Become the parent of what descends from this process when its own parent ends (prctl(2)).

    Raises:
        OSError: the kernel refuses it.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class Orphans:
    """Reaps adopted processes that have ended."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}

    def reap(self, kept: set[int]) -> None:
        """Reap children that ended half a minute ago. Whoever started one itself has reaped it before.

        Args:
            kept: those that must stay as they are.
        """
        now, me = time.monotonic(), os.getpid()
        try:
            children = {int(pid) for pid in Path(f"/proc/self/task/{me}/children").read_text(encoding="ascii").split()}
        except OSError:  # a kernel without this file: they stay until this process ends
            return
        ended = {pid for pid in children - kept if _state(pid) == b"Z"}
        self._seen = {pid: self._seen.get(pid, now) for pid in ended}
        for pid in [pid for pid, since in self._seen.items() if now - since > ADOPTED_SECONDS]:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)
