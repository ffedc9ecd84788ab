"""Who watches: the daemon's liveness file `daemon.json`, and the lock that a living daemon holds.

On its own host a daemon is asked by its lock, which the kernel releases when the process ends, in whatever way. On
other hosts only the age of its liveness file is known. A daemon that lives does not watch a lineage unless its file
names that lineage.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from opt_ops.core.text import age
from opt_ops.core.waiting import still_waiting
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import read_json

FILE = "daemon.json"
LOCK = "daemon.lock"
JOB_WATCH_FILE = "watch-job.json"
"""In a lineage's folder: `opt-ops run watch-job` writes this lineage, and no daemon does."""
OLD_SECONDS = 30.0  # a daemon writes its liveness file every two seconds
_OLD_ELSEWHERE_SECONDS = 90.0  # an NFS client may show a replaced file for up to acdirmax, 60 s (nfs(5))

_LOCK_SECONDS = 1.0  # that a daemon waits for the lock


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a daemon last wrote about itself. Times are seconds since the epoch."""

    ts: float
    host: str
    pid: int
    version: str = ""
    policy: str = ""
    lineages: tuple[str, ...] = ()
    """The lineages that it watches."""
    fenced: tuple[str, ...] = ()
    """The lineages that a newer daemon process has taken from it."""
    unwatched: Mapping[str, str] = field(default_factory=dict[str, str])
    """The lineages that it cannot watch, each with the reason."""
    paged: Mapping[str, float] = field(default_factory=dict[str, float])
    """When it last paged on-call for a lineage that it cannot watch."""
    problems: tuple[Mapping[str, Any], ...] = ()
    """What else fails: `what` and `why`, and `lineage` if it concerns one only."""
    left_at: float | None = None
    """When it left by itself."""

    @property
    def name(self) -> str:
        """For people: `pid 812 on login2`."""
        return f"pid {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Whether a lineage is watched. If not: `why` for people, and `next`, the command that helps."""

    watched: bool
    finding: str = ""  # unwatched or fenced
    why: str = ""
    next: str = ""
    sign: Sign | None = None
    """That of the daemon that watches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Which daemons of a runs folder live, as of one moment."""

    runs: Path
    now: float
    living: tuple[Sign, ...]
    last: Sign | None
    """The newest sign, of a living daemon if there is one."""
    why: str = ""
    """Why no daemon lives."""

    def over(self, lineage: str) -> Watcher:
        """Whether a lineage is watched now."""
        if (own := job_watch(self.runs / lineage, self.now)) is not None:
            return own
        for sign in self.living:
            if lineage in sign.lineages:
                return Watcher(watched=True, sign=sign)
        for sign in self.living:
            if lineage in sign.fenced:
                why = f"fenced: {sign.name} has lost it to a newer daemon process, and no living daemon watches it"
                return Watcher(watched=False, finding="fenced", why=why, next="opt-ops daemon status")
        for sign in self.living:
            if lineage in sign.unwatched:
                why = f"nobody watches: {sign.unwatched[lineage]}"
                return Watcher(watched=False, finding="unwatched", why=why, next="opt-ops daemon status")
        if self.living:
            why = f"nobody watches yet: the daemon, {self.living[0].name}, has not taken it over"
            return Watcher(watched=False, finding="unwatched", why=why, next="opt-ops daemon status")
        return Watcher(watched=False, finding="unwatched", why=self.why, next="opt-ops daemon ensure")

    def takes_requests(self, lineage: str) -> bool:
        """Whether a daemon lives that reads the lineage's inbox, though it need not watch the lineage yet."""
        return any(lineage not in sign.fenced and lineage not in sign.unwatched for sign in self.living)


def look(runs: Path, now: float) -> Watch:
    """Find out which daemons of a runs folder live. What cannot be read is no sign."""
    signs = sorted(signs_in(runs), key=lambda sign: sign.ts, reverse=True)
    held = lock_held(runs)
    living = tuple(sign for sign in signs if lives(sign, now, held))
    last = next(iter((*living, *signs)), None)
    return Watch(runs=runs, now=now, living=living, last=last, why="" if living else _why(runs, now, last, held))


def signs_in(runs: Path) -> list[Sign]:
    """The signs of all daemons. A second daemon has a file of its own, as long as the first one lives."""
    found = (read_sign(path) for path in sorted(runs.glob("daemon*.json")))
    return [sign for sign in found if sign is not None]


def read_sign(path: Path) -> Sign | None:
    """A liveness file; None if there is none, or if it is not what docs/formats.md says."""
    try:
        return sign_of(read_json(path))
    except (OSError, OptOpsError, ValueError):
        return None


def sign_of(value: Any) -> Sign | None:
    """A JSON value as a sign; None if it lacks what says who and when. Other fields that are odd are left out."""
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, Any]", value)
    ts, host, pid = _time(fields.get("ts")), fields.get("host"), fields.get("pid")
    if ts is None or not isinstance(host, str) or not isinstance(pid, int) or isinstance(pid, bool):
        return None
    return Sign(
        ts=ts,
        host=host,
        pid=pid,
        version=_text(fields.get("version")),
        policy=_text(fields.get("policy")),
        lineages=_texts(fields.get("lineages")),
        fenced=_texts(fields.get("fenced")),
        unwatched={name: _text(why) for name, why in _items(fields.get("unwatched"))},
        paged={name: at for name, since in _items(fields.get("paged")) if (at := _time(since)) is not None},
        problems=tuple(_problems(fields.get("problems"))),
        left_at=_time(fields.get("left_at")),
    )


def job_watch(lineage: Path, now: float) -> Watcher | None:
    """Who watches a lineage that `opt-ops run watch-job` writes; None: it is a daemon's."""
    path = lineage / JOB_WATCH_FILE
    if not path.exists():
        return None
    sign = read_sign(path)
    if sign is None:
        why = f"{path} cannot be read, so it is not known whether opt-ops run watch-job still runs"
        return Watcher(watched=False, finding="unwatched", why=why, next="opt-ops run watch-job JOBID")
    fresh = sign.left_at is None and still_waiting(now, sign.ts, OLD_SECONDS)
    if fresh and (sign.host != socket.gethostname() or Path(f"/proc/{sign.pid}").exists()):
        return Watcher(watched=True, sign=sign)
    gone = age(now - (sign.left_at or sign.ts))
    how = "was ended" if sign.left_at is not None else "has died, or cannot write"
    why = f"nobody watches since {gone}: opt-ops run watch-job, {sign.name}, {how}"
    return Watcher(watched=False, finding="unwatched", why=why, next="opt-ops run watch-job JOBID")


_LATEST = 253402300799.0  # the last second of the year 9999: later times cannot be shown


def _time(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LATEST
    return float(value) if known else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def _items(value: Any) -> Sequence[tuple[str, Any]]:
    return [(str(name), each) for name, each in value.items()] if isinstance(value, dict) else []


def _problems(value: Any) -> Sequence[Mapping[str, Any]]:
    known = value if isinstance(value, list) else []
    return [each for each in known if isinstance(each, dict) and isinstance(each.get("what"), str)]


def lives(sign: Sign, now: float, held: bool | None) -> bool:
    """Whether the daemon of a sign lives. `held`: whether the lock is held; None: it cannot be known."""
    if sign.left_at is not None or not still_waiting(now, sign.ts, OLD_SECONDS):
        return False
    if sign.host != socket.gethostname():
        return True
    return is_daemon(sign.pid) if held is None else held


def may_live_elsewhere(sign: Sign, now: float) -> bool:
    """Whether a daemon of another host must be assumed to run: for longer than a reader would trust its sign.

    This host cannot see whether it holds the lock.
    """
    return sign.host != socket.gethostname() and sign.left_at is None and now - sign.ts < _OLD_ELSEWHERE_SECONDS


def _why(runs: Path, now: float, last: Sign | None, held: bool | None) -> str:
    if last is None:
        return f"nobody watches: no daemon has ever run for {runs}"
    gone = age(now - (last.left_at or last.ts))
    if last.left_at is not None:
        return f"nobody watches since {gone}: the daemon, {last.name}, was stopped"
    if last.host != socket.gethostname():
        return f"nobody watches since {gone}: that long there was no sign of the daemon, {last.name}"
    if held:
        return f"nobody watches since {gone}: {last.name} holds the lock and gives no sign. It hangs, or cannot write"
    return f"nobody watches since {gone}: the daemon, {last.name}, has died"


def span(seconds: float) -> str:
    """`48 s`, `22m08s`, `3h12m`."""
    return f"{max(0, int(seconds))} s" if seconds < 60 else age(seconds)


def lock_held(runs: Path) -> bool | None:
    """Whether a process holds the daemon's lock; None if that cannot be known, for example without locks on Lustre."""
    try:
        descriptor = os.open(runs / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at the close below
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def take_lock(lock: IO[Any]) -> None:
    """Take the daemon's lock for as long as this process lives. A command that asks for it holds it for a moment only.

    Raises:
        BlockingIOError: another daemon holds it.
        OSError: the file system has no locks.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_SECONDS / 20)
        else:
            return


def is_daemon(pid: int) -> bool:
    """Whether this pid of this host is a running daemon: not a zombie, not another process with a reused pid."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    ours = any(word.endswith((b"opt_ops", b"opt-ops", b"opt_ops/__main__.py")) for word in words)
    return ours and (b"daemon", b"run") in itertools.pairwise(words)
