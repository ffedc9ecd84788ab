"""Watches the replacement of ranks: whether all have joined, and whether the other processes are the same as before."""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.core.events import Event, MembersJoined
from opt_ops.core.state.model import Attempt, Members, State
from opt_ops.ports import Agents, Trainer
from opt_ops.supervise.guard import Guard

_Process = tuple[int, float]
"""The pid of a rank, and when it started."""


class MembersWatch:
    """Follows the membership of the newest attempt."""

    def __init__(self, trainer: Trainer, agents: Agents, guard: Guard) -> None:
        """`guard`: the supervisor's, which tells of parts that fail."""
        self._trainer = trainer
        self._agents = agents
        self._guard = guard
        self._before: dict[int, _Process] = {}
        self._known: tuple[str, int] = ("", 0)
        """The attempt and the generation of which `_before` has the processes."""

    def observe(self, state: State) -> Iterator[Event]:
        """Yield that all ranks of the newest generation have joined."""
        attempt = state.attempt
        if attempt is None or not attempt.live or attempt.first_step is None or not attempt.capabilities:
            return
        newest = attempt.rejoining
        if newest is None:
            self._guard.call("the processes of ranks", lambda: self._remember(attempt), None)
            return
        for joined in self._guard.each("members.jsonl", lambda: self._trainer.members(attempt.name)):
            if joined.generation == newest.generation and attempt.stop_why is None:
                kept = self._guard.call("the processes of ranks", lambda: self._kept(attempt, newest), None)
                yield MembersJoined(
                    attempt=attempt.name,
                    generation=joined.generation,
                    step=joined.step,
                    at=joined.at,
                    repeated=joined.repeated,
                    kept=kept,
                )

    def _remember(self, attempt: Attempt) -> None:
        """Take note of the processes, once in a generation: they stay what they are."""
        if self._known == (attempt.name, attempt.generation):
            return
        found = self._processes(attempt)
        if len(found) == attempt.ranks:
            self._before = {rank: process for rank, (_, process) in found.items()}
            self._known = attempt.name, attempt.generation

    def _kept(self, attempt: Attempt, newest: Members) -> int | None:
        """How many ranks that were not replaced have the process that they had. None: agents do not tell of any.

        A process that began in an older generation is one that was there. What this daemon process has seen before must
        agree.
        """
        found = self._processes(attempt)
        before = self._before if self._known[0] == attempt.name else {}
        stay = (rank for rank in range(attempt.ranks) if rank not in newest.new)
        same = (
            rank in found and found[rank][0] < newest.generation and before.get(rank, found[rank][1]) == found[rank][1]
            for rank in stay
        )
        return sum(same) if found else None

    def _processes(self, attempt: Attempt) -> dict[int, tuple[int, _Process]]:
        """Of each rank that runs, the first generation of its process, and which it is."""
        reports, each = self._agents.reports(attempt.name), attempt.ranks_per_node
        return {
            rank: (first, (pid, start))
            for place, node in enumerate(attempt.nodes)
            if node in reports
            for rank, (first, pid, start) in reports[node].pids.items()
            if rank in range(place * each, (place + 1) * each)
        }
