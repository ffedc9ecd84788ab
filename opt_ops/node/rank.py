"""One process of a rank, and its entry in the report. The process that replaces it has an entry of its own."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from opt_ops.contract.membership import Membership, joining, lost_file, write_membership
from opt_ops.node.members_folder import forget, has_lost_peer
from opt_ops.node.process_groups import ChildProcess, RankProcess
from opt_ops.node.rank_log import RankLog
from opt_ops.node.standby_ranks import Standby

GRACE_SECONDS = 5.0  # between SIGINT and SIGKILL


class Rank:
    """One process of a rank.

    Args:
        number: the rank.
        local: its number on this node.
        generation: the first one of the membership that it takes part in.
        members: its members file.
        log: where its output goes.

    Attributes:
        entry: what the report says of it.
        process: None if it could not be started.
    """

    def __init__(self, number: int, local: int, generation: int, members: Path, log: Path) -> None:
        self.number, self.local, self.members, self.log_path = number, local, members, log
        self.process: RankProcess | None = None
        self._log = RankLog(log)
        self._ending_since: float | None = None
        self.entry: dict[str, Any] = {
            "rank": number,
            "pid": None,
            "code": None,
            "signal": None,
            "ended": None,
            "generations": [generation, generation],
        }

    def runs_as(self, child: ChildProcess, at: float) -> None:
        """Take the process that was started for it. `at`: when, in seconds since the epoch."""
        self.process = RankProcess(child, self.members)
        self.entry["pid"], self.entry["start"] = child.pid, at

    def takes(self, standby: Standby) -> None:
        """Take a warm process that has waited here for a place, with its members file and its log."""
        self.members, self.log_path, self._log = standby.members, standby.log, RankLog(standby.log)
        self.process = standby.process
        self.entry |= {"pid": standby.process.pid, "start": standby.at, "log": standby.log.name}

    def cannot_start(self) -> None:
        """Report that it could not begin: 127, as a shell does."""
        self.signal(signal.SIGKILL)  # of a warm process that could not be told its place
        self.entry["code"], self.entry["ended"] = 127, time.time()

    @property
    def generation(self) -> int:
        """The first one that it takes part in."""
        return self.entry["generations"][0]

    @property
    def ended(self) -> bool:
        """Whether its end is in the report."""
        return self.entry["ended"] is not None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.alive

    @property
    def lost_peer(self) -> bool:
        """Whether it waits for a newer generation, because it has lost a peer."""
        return self.alive and has_lost_peer(self.members)

    def tell(self, membership: Membership) -> None:
        """Write its members file.

        Raises:
            OSError: it cannot be written.
        """
        self.members.parent.mkdir(mode=0o700, exist_ok=True)  # somebody may have tidied up
        lost_file(self.members).unlink(missing_ok=True)
        write_membership(self.members, membership)
        if membership.rank is not None:
            self.entry["generations"][1] = membership.generation

    def look_at_joining(self) -> bool:
        """Put into the report which generation it has begun to join. Returns whether that is news."""
        told, before = self.entry["generations"][1], self.entry.get("joining", 1)
        if not self.alive or before >= told:
            return False
        said = min(told, joining(self.members) or 1)
        if said > before:
            self.entry["joining"] = said
        return said > before

    def look_at_log(self, until: float) -> None:
        """Follow its log until that time (`time.monotonic()`)."""
        self._log.look(until)

    def reap(self) -> bool:
        """Put its end into the report. Returns whether it has ended since the last call."""
        if self.ended or self.process is None or (code := self.process.code) is None:
            return False
        self.entry["code"], self.entry["signal"] = (code, None) if code >= 0 else (None, -code)
        self.entry["ended"] = time.time()
        if code != 0:
            self.entry["tail"] = self._log.tail()
            self.entry["causes"] = [
                {"line": line.text, "at": line.at, "step": line.step, "stale": line.stale} for line in self._log.end()
            ]
        forget(self.members)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and its children."""
        if self.process is not None:
            self.process.signal_group(number)

    def end(self) -> None:
        """End it: SIGINT at the first call, SIGKILL after the grace period. One that is stopped hears SIGKILL only.

        SIGTERM means notice by the scheduler, which sends it to every process of a job that it will end. The ranks must
        save then, not end.
        """
        if self.process is None:
            return
        if self.process.stopped:
            self.signal(signal.SIGKILL)
        elif self._ending_since is None:
            self._ending_since = time.monotonic()
            self.signal(signal.SIGINT)
        elif time.monotonic() - self._ending_since > GRACE_SECONDS:
            self.signal(signal.SIGKILL)
