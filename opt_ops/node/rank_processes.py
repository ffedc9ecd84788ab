"""The ranks of one attempt on one node: started, replaced, signalled, reaped, and reported as its orders say."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from opt_ops.contract.files import open_append
from opt_ops.core.names import attempt_folder
from opt_ops.node.log import log
from opt_ops.node.members_folder import MembersFolder
from opt_ops.node.places import generation_of, membership_for, new_in, places_on
from opt_ops.node.process_groups import CleanUp, catches, end_earlier
from opt_ops.node.rank import Rank
from opt_ops.node.rank_log import LOOK_SECONDS
from opt_ops.node.rank_start import TRACE, ColdStart, Starter, rank_variables
from opt_ops.node.stacks import dump
from opt_ops.node.standby_ranks import StandbyRanks
from opt_ops.runfolder.files import create_json, read_json, write_json


class RankProcesses:
    """The processes of one attempt on this node, and the report on them.

    Args:
        folder: that of the lineage.
        node: the name of this node.
        launch: the orders for the attempt.
        members: where members files are.
        starter: starts processes.
        standbys: warm ranks that wait here for a place.
    """

    def __init__(
        self,
        folder: Path,
        node: str,
        launch: Mapping[str, Any],
        members: MembersFolder,
        starter: Starter | None = None,
        standbys: StandbyRanks | None = None,
    ) -> None:
        self.attempt: str = launch["attempt"]
        self._lineage, self._folder = folder.absolute(), (folder / attempt_folder(self.attempt)).absolute()
        self._path = folder / attempt_folder(self.attempt) / "nodes" / f"{node}.json"
        self._logs = folder / attempt_folder(self.attempt) / "logs"
        self._stacks = folder / attempt_folder(self.attempt) / "stacks"
        self._node = node
        self._launch = launch
        self._members = members
        self._starter = starter or ColdStart()
        self._standbys = standbys
        self._ranks: list[Rank] = []
        """Every process that this agent has started for the attempt, oldest first."""
        self._places: dict[int, Rank] = {}
        """Those that have a place, by their number on this node."""
        self._earlier: list[dict[str, Any]] = []
        """Entries of processes that an earlier agent started. They died with it."""
        self._generation = 0
        """The newest one that was carried out."""
        self._clean_up = CleanUp(node, self._folder, members.path)
        self._started = time.time()
        self._ending = False
        self._saved = True
        self.reporting = True
        """False while the lineage's folder is gone: a report would create it again."""

    def start(self) -> None:
        """Start the ranks of this node.

        An attempt starts at most once on a node. If an earlier agent has started ranks of it here, they have died with
        it, and only a newer generation starts new ones.
        """
        generation = generation_of(self._launch)
        places = places_on(self._launch, self._node)
        planned = [self._made(number, local, generation) for local, number in places.items()]
        if not create_json(self._path, self._report(planned)):
            before = self._take_over(planned)
            missed = generation > before + 1
            planned = [rank for rank in planned if generation > before and (missed or rank.number in self._new)]
        self._generation = generation
        if planned:
            end_earlier(self._node, self._lineage, self._folder)
        for rank in planned:
            self._seat(rank)
        self._save()

    def follow(self, launch: Mapping[str, Any]) -> None:
        """Carry out a newer generation of the membership. What has a place goes on; what is new starts.

        Raises:
            OSError: a members file cannot be written. The next call goes on where this one ended.
        """
        generation = generation_of(launch)
        if generation <= self._generation:
            return
        missed = generation > self._generation + 1  # a rank may be dead that an order replaced which was never read
        self._launch = launch
        places = places_on(launch, self._node)
        for local, rank in list(self._places.items()):
            if places.get(local) != rank.number:
                self._unseat(rank)
        for local, number in places.items():
            rank = self._places.get(local)
            starts = number in self._new or (missed and rank is not None and not rank.alive)
            if rank is not None and (rank.generation == generation or (rank.alive and not starts)):
                rank.tell(membership_for(launch, local, number))
            elif starts:
                if rank is not None:
                    self._unseat(rank)
                    rank.signal(signal.SIGKILL)  # it is dead, or stuck, and another one takes its place now
                self._seat(self._made(number, local, generation))
        self._generation = generation
        self._save()

    @property
    def _new(self) -> frozenset[int]:
        return new_in(self._launch)

    def _take_over(self, planned: list[Rank]) -> int:
        """Report what an earlier agent of this node has started as killed. Returns its newest generation."""
        found = read_json(self._path) or self._report(planned)
        self._started, self._earlier = found["started"], found["ranks"]
        for entry in self._earlier:
            if entry["ended"] is None:
                entry["signal"], entry["ended"] = int(signal.SIGKILL), time.time()
        return max((entry.get("generations", (1, 1))[1] for entry in self._earlier), default=1)

    def _made(self, number: int, local: int, generation: int) -> Rank:
        return Rank(number, local, generation, self._members.name(f"rank-{number:04d}"), self._log(number))

    def _seat(self, rank: Rank) -> None:
        """Start the process of a rank, or give the place to a warm rank that waits here."""
        for made in (self._logs, (self._stacks / TRACE).parent):
            made.mkdir(parents=True, exist_ok=True)
        self._ranks.append(rank)
        self._places[rank.local] = rank
        try:
            self._begin(rank)
        except OSError as error:
            with suppress(OSError), open_append(rank.log_path) as file:  # if the disk is full, the exit code must do
                file.write(f"cannot start {self._launch['argv'][0]}: {error}\n".encode())
            rank.cannot_start()

    def _begin(self, rank: Rank) -> None:
        standby = None if self._standbys is None else self._standbys.take(self.attempt, rank.local)
        if standby is not None:
            rank.takes(standby)
        membership = membership_for(self._launch, rank.local, rank.number)
        if membership.generation > 1:  # before the process starts: it reads the file, and finds itself among the new
            rank.tell(replace(membership, new=tuple(sorted({*membership.new, rank.number}))))
        if standby is None:
            variables = rank_variables(self._lineage, self._launch, self._node, rank.number, rank.local, rank.members)
            rank.runs_as(self._starter.start(self._launch, variables, rank.log_path), time.time())

    def _unseat(self, rank: Rank) -> None:
        """Take its place from a process, and end it."""
        del self._places[rank.local]
        if rank.alive:
            rank.tell(membership_for(self._launch, rank.local, None))
            rank.end()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank:04d}.log"

    def _report(self, ranks: list[Rank]) -> dict[str, Any]:
        entries = [*self._earlier, *(rank.entry for rank in ranks)]
        return {"v": 1, "node": self._node, "attempt": self.attempt, "started": self._started, "ranks": entries}

    def _save(self) -> None:
        if not self.reporting:
            return
        try:
            write_json(self._path, self._report(self._ranks))
            self._saved = True
        except OSError as error:  # a full disk must not end the ranks; the report is written when there is room
            self._saved = False
            log(f"{self._path} cannot be written: {error}")

    def reap(self) -> bool:
        """Record the ranks that ended since the last call. Returns whether there is any."""
        changed, news = not self._saved, False
        self._look_at_logs()
        for rank in self._ranks:
            changed = rank.reap() or changed
            news = rank.look_at_joining() or news
            if rank.alive and self._places.get(rank.local) is not rank:
                rank.end()
        if changed or news:
            self._save()
        self._clean_up.look([rank.process for rank in self._ranks if rank.process is not None], ending=self._ending)
        return changed

    def _look_at_logs(self) -> None:
        """Follow the logs of the ranks that run; all of them together for `LOOK_SECONDS`."""
        running = [rank for rank in self._ranks if not rank.ended]
        for rank in running:
            rank.look_at_log(time.monotonic() + LOOK_SECONDS / len(running))

    @property
    def lost_peer(self) -> bool:
        """Whether a rank waits for a newer generation, because it has lost a peer."""
        return any(rank.lost_peer for rank in self._places.values())

    @property
    def pids(self) -> set[int]:
        """The processes that are not reaped yet, or run."""
        processes = [rank.process for rank in self._ranks if rank.process is not None]
        return {process.pid for process in processes if not process.released}

    def drill(self, rank: int | None, number: signal.Signals) -> None:
        """Send a signal to the newest process of one rank and to its children."""
        for each in self._places.values():
            if each.number == rank:
                each.signal(number)

    def save(self) -> None:
        """Ask the ranks for a checkpoint (SIGUSR1). A rank without a handler is skipped: the signal would kill it."""
        for rank in self._places.values():
            if rank.process is not None and rank.alive and catches(rank.process.pid, signal.SIGUSR1):
                os.kill(rank.process.pid, signal.SIGUSR1)

    def dump(self, name: str) -> None:
        """Ask the ranks for their stacks, and collect them."""
        places = self._places.values()
        alive = {rank.number: rank.process for rank in places if rank.process is not None and rank.alive}
        write_json(self._stacks / name / f"{self._node}.json", dump(self._stacks, alive))

    def end(self, launch: Mapping[str, Any] | None = None) -> None:
        """End the ranks: SIGINT at the first call, SIGKILL to the rest after the grace period.

        Args:
            launch: the orders of a newer generation, if that is why: they learn that they have no place any more.
        """
        self._ending = True
        if launch is not None and generation_of(launch) > self._generation:
            self._launch, self._generation = launch, generation_of(launch)
            for rank in self._ranks:
                if rank.alive:
                    rank.tell(membership_for(launch, rank.local, None))
        for rank in self._ranks:
            rank.end()

    @property
    def done(self) -> bool:
        """Whether all ranks have ended, and nothing of what they started is left."""
        return all(rank.ended for rank in self._ranks) and self._clean_up.done
