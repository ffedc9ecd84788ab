"""Watches the replacement of ranks: who does not join, whether all have joined, and whether the others are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from opt_ops.core.decide.members import deadline_of
from opt_ops.core.decide.policy import Policy
from opt_ops.core.events import Event, MembersJoined, SignalRaised
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.model import State
from opt_ops.core.values import Tier
from opt_ops.core.waiting import still_waiting
from opt_ops.ports import Agents, Clock, NodeRanksReport, Trainer
from opt_ops.supervise.guard import Guard

_T = TypeVar("_T")

_Process = tuple[int, float]
"""The pid of a rank, and when it started."""

_STUCK_SHARE = 1 / 3
"""Of the time that a replacement has: so long a survivor may take to leave its old groups. Usually that takes less than
a second. Then there is time for one more generation without it."""


class MembersWatch:
    """Follows the membership of the newest attempt."""

    def __init__(self, policy: Policy, trainer: Trainer, agents: Agents, clock: Clock, guard: Guard) -> None:
        """`guard`: the supervisor's, which tells of parts that fail."""
        self._policy, self._clock = policy, clock
        self._trainer = trainer
        self._agents = agents
        self._guard = guard
        self._before: dict[int, _Process] = {}
        self._known: tuple[str, int] = ("", 0)
        """The attempt and the generation of which `_before` has the processes."""

    def observe(self, state: State) -> Iterator[Event]:
        """Yield that all ranks of the newest generation have joined, or which of them are stuck."""
        attempt = state.attempt
        if attempt is None or not attempt.live or attempt.first_step is None or not attempt.capabilities:
            return
        newest = attempt.rejoining
        if newest is None:
            self._guard.call("the processes of ranks", lambda: self._remember(attempt), None)
            return
        have_joined = False
        for joined in self._guard.each("members.jsonl", lambda: self._trainer.members(attempt.name)):
            if joined.generation == newest.generation and attempt.stop_why is None:
                have_joined = True
                kept = self._guard.call("the processes of ranks", lambda: self._kept(attempt, newest), None)
                yield MembersJoined(
                    attempt=attempt.name,
                    generation=joined.generation,
                    step=joined.step,
                    at=joined.at,
                    repeated=joined.repeated,
                    kept=kept,
                )
        if not have_joined and attempt.stop_why is None:
            stuck = self._guard.call("the ranks that join", lambda: self._stuck(state, attempt, newest), None)
            if stuck is not None and stuck.key not in state.signals:
                yield stuck

    def _stuck(self, state: State, attempt: Attempt, newest: Members) -> SignalRaised | None:
        """The survivors that run and have not begun to join, though others have, and the time for it is over."""
        incident = state.incidents.get(newest.incident or "")
        patience = _STUCK_SHARE * (
            self._policy.in_place_seconds if incident is None else deadline_of(incident, self._policy)
        )
        if still_waiting(self._clock.now(), newest.intended_at, patience):
            return None
        found, joining = self._processes(attempt), self._told(attempt, lambda report: report.joining)
        if all(generation < newest.generation for generation in joining.values()):  # not every trainer says it
            return None
        stay = (rank for rank in found if rank not in newest.new)
        ranks = sorted(rank for rank in stay if joining.get(rank, 1) < newest.generation)
        if not ranks:
            return None
        return SignalRaised(
            generation=attempt.generation,
            signal=FailureClass.HANG,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=attempt.last_step,
            onset_step=None,
            at=newest.intended_at,
            nodes=attempt.nodes_of(ranks),
            rule=f"a rank has not begun to join a newer generation {patience:g} s after the order, and others have",
            evidence={"lost_ranks": ranks, "patience": patience},
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
        pids = self._told(attempt, lambda report: report.pids)
        return {rank: (first, (pid, start)) for rank, (first, pid, start) in pids.items()}

    def _told(self, attempt: Attempt, part: Callable[[NodeRanksReport], Mapping[int, _T]]) -> dict[int, _T]:
        """By rank, what this part of the reports says of the ranks that have their place on the node."""
        reports, each = self._agents.reports(attempt.name), attempt.ranks_per_node
        return {
            rank: told
            for place, node in enumerate(attempt.nodes)
            if node in reports
            for rank, told in part(reports[node]).items()
            if rank in range(place * each, (place + 1) * each)
        }
