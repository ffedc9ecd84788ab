"""Standby ranks: warm processes of the trainer that wait on this node for a place.

A standby has done everything that needs no other rank. It belongs to one attempt, because its command line does. Its
members file gives it a place, and it is a rank from then on.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops.contract import environment
from opt_ops.core.names import attempt_folder
from opt_ops.node.log import log
from opt_ops.node.members_folder import MembersFolder, forget, is_ready
from opt_ops.node.process_groups import CleanUp, RankProcess
from opt_ops.node.rank_start import Starter, rank_variables

PAUSE_AFTER_USE = 3.0
"""Seconds before another standby starts, after one got a place: its warm-up would take what the recovery needs."""

LONGEST_PAUSE = 60.0
"""Seconds before a standby that has died starts again. The first pause is one second, each further one is doubled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """A warm process without a place.

    `local`: the number on this node that it is made for; None: any.
    """

    process: RankProcess
    at: float  # when it started, in seconds since the epoch
    members: Path
    log: Path
    local: int | None

    @property
    def ready(self) -> bool:
        """Whether it has done all that needs no other rank."""
        return self.process.alive and not self.process.stopped and is_ready(self.members, time.time())


class StandbyRanks:
    """The standbys of this node: as many as the orders say, replaced when they end or get a place."""

    def __init__(self, lineage: Path, node: str, members: MembersFolder, starter: Starter) -> None:
        self._lineage, self._node = lineage.absolute(), node
        self._members = members
        self._starter = starter
        self._attempt = ""
        self._standbys: list[Standby] = []
        self._ended: list[Standby] = []
        self._clean_up: CleanUp | None = None
        self._next_start = 0.0
        self._deaths = 0

    def follow(self, launch: Mapping[str, Any] | None, wanted: int, may_start: bool) -> None:
        """Keep `wanted` standbys for the attempt of `launch`.

        Args:
            launch: the attempt that they wait for; None: there is none.
            wanted: how many.
            may_start: whether new ones may start now, that is, whether there is a warm process.
        """
        self._reap()
        attempt = launch["attempt"] if launch is not None else ""
        if attempt != self._attempt:
            if not self.end():
                return
            self._attempt, self._deaths, self._next_start = attempt, 0, 0.0
            folder = self._lineage / attempt_folder(attempt)
            self._clean_up = CleanUp(self._node, folder, self._members.path) if attempt else None
        for standby in self._standbys[wanted:]:
            self._kill(standby)
        if any(standby.ready for standby in self._standbys):
            self._deaths = 0
        if launch is None or not may_start or time.monotonic() < self._next_start:
            return
        while len(self._standbys) < wanted:
            self._start(launch, wanted)

    @property
    def counts(self) -> dict[str, int]:
        """How many are ready, and how many are not yet."""
        ready = sum(standby.ready for standby in self._standbys)
        return {"ready": ready, "warming": len(self._standbys) - ready}

    def ready(self, launch: Mapping[str, Any] | None) -> bool:
        """Whether all that the orders want here are ready."""
        return self.counts["ready"] >= (launch["standbys"].get(self._node, 0) if launch is not None else 0)

    @property
    def pids(self) -> set[int]:
        """The processes that run, or are not reaped yet."""
        return {each.process.pid for each in (*self._standbys, *self._ended)}

    def take(self, attempt: str, local: int) -> Standby | None:
        """Return a standby for the place with this number on this node; None if none is ready.

        Its members file is for the caller to write.
        """
        if attempt != self._attempt:
            return None
        fitting = (each for each in self._standbys if each.local in (None, local) and each.ready)
        if (found := next(fitting, None)) is not None:
            self._standbys.remove(found)
            self._next_start = max(self._next_start, time.monotonic() + PAUSE_AFTER_USE)
        return found

    def end(self) -> bool:
        """End all of them. Returns whether none is left."""
        for standby in list(self._standbys):
            self._kill(standby)
        self._reap()
        return not self._ended

    def _kill(self, standby: Standby) -> None:
        self._standbys.remove(standby)
        self._ended.append(standby)
        standby.process.signal_group(signal.SIGKILL)  # there is nothing that it could save

    def _start(self, launch: Mapping[str, Any], wanted: int) -> None:
        # On a spare node each is for one GPU. On a node in use any place may need it, and the GPUs are in use.
        spare = self._node not in launch["holders"] and wanted == launch["ranks_per_node"]
        used = {each.local for each in self._standbys}
        local = next(i for i in range(wanted) if i not in used) if spare else None
        members = self._members.name("standby")
        logs = self._lineage / attempt_folder(launch["attempt"]) / "logs"
        path = logs / f"{members.stem}-{self._node}.log"
        variables = _variables(self._lineage, launch, self._node, local, members)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            child = self._starter.start(launch, variables, path)
        except OSError as error:
            self._died(f"a standby cannot be started: {error}")
            raise
        process = RankProcess(child, members)
        self._standbys.append(Standby(process=process, at=time.time(), members=members, log=path, local=local))

    def _reap(self) -> None:
        for standby in [each for each in self._standbys if not each.process.alive]:
            self._standbys.remove(standby)
            self._ended.append(standby)
            self._died(f"a standby has ended with {standby.process.code}: {standby.log}")
        if self._clean_up is not None:
            self._clean_up.release([each.process for each in self._ended if not each.process.alive])
        for standby in [each for each in self._ended if each.process.released]:
            self._ended.remove(standby)
            forget(standby.members)

    def _died(self, what: str) -> None:
        self._deaths += 1
        pause = min(LONGEST_PAUSE, 2.0 ** min(self._deaths - 1, 10))
        self._next_start = time.monotonic() + pause
        log(f"{what}; the next start is in {pause:.0f} s")


def _variables(lineage: Path, launch: Mapping[str, Any], node: str, local: int | None, members: Path) -> dict[str, str]:
    """What a standby gets: everything that a rank gets, but for its number and where ranks meet."""
    variables = rank_variables(lineage, launch, node, 0, local or 0, members)
    return environment.of_standby(variables, knows_local=local is not None)
