"""Runs, their attempts, and the replacements of ranks of an attempt, as the state holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.values import (
    Checkpoint,
    DataSince,
    LrFactor,
    Optimizer,
    Outcome,
    PlannedChange,
    RankExit,
    Readback,
    Schedule,
    Skip,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A stretch of the lineage under one set of settings."""

    name: str
    parent: str | None
    cause: str
    incident: str | None
    checkpoint: Checkpoint | None
    lr_factors: tuple[LrFactor, ...]
    planned_at: float
    settings: tuple[str, ...] = ()  # on top of the lineage's
    skips: tuple[Skip, ...] = ()
    data: tuple[DataSince, ...] = ()  # what replaces the lineage's, by step


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """A replacement of ranks of a running attempt, and what came of it."""

    generation: int
    nodes: tuple[str, ...]  # of the attempt from then on
    before: tuple[str, ...]
    new: tuple[int, ...]  # the ranks that are replaced
    incident: str | None
    intended_at: float
    joined_at: float | None = None
    step: int | None = None  # whose state all ranks went on from
    repeated: int | None = None  # steps that were made again
    kept: int | None = None  # ranks that were not replaced and whose process is the same as before
    failed: str | None = None  # why it did not come together
    first_step: int | None = None  # the first one that this generation made
    first_step_at: float | None = None
    readbacks: tuple[Readback, ...] = ()  # of its first steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One launch of the training processes, and the replacements of some of them."""

    name: str
    run: str
    nodes: tuple[str, ...]  # of the newest generation
    ranks_per_node: int
    checkpoint: Checkpoint | None
    incident: str | None  # the one that this attempt recovers from
    intended_at: float
    started_at: float | None = None
    steps: int | None = None
    schedule: Schedule | None = None
    optimizer: Optimizer | None = None
    versions: Mapping[str, Any] | None = None
    planned: tuple[PlannedChange, ...] = ()  # as its config.json says
    data: str | None = None  # digest of what it trains on
    first_step: int | None = None
    first_step_at: float | None = None
    last_step: int | None = None
    last_step_at: float | None = None
    readbacks: tuple[Readback, ...] = ()
    progress_epoch: int = 0  # the daemon process that last saw it advance
    leave_why: str | None = None  # it ends after one more checkpoint
    leave_at: float | None = None
    leave_seq: int | None = None
    leave_step: int | None = None  # how far it had come then
    stop_why: str | None = None
    stop_at: float | None = None
    stop_seq: int | None = None
    outcome: Outcome | None = None
    ended_at: float | None = None
    exits: tuple[RankExit, ...] = ()  # the first ones
    ended: Mapping[str, int] = field(default_factory=dict[str, int])  # how all ranks did
    members: tuple[Members, ...] = ()  # the replacements, oldest first
    capabilities: tuple[str, ...] = ()  # of its trainer, as its config.json says

    @property
    def generation(self) -> int:
        """Of its membership: 1, and one more with each replacement of ranks."""
        return self.members[-1].generation if self.members else 1

    @property
    def rejoining(self) -> Members | None:
        """The replacement that is under way."""
        newest = self.members[-1] if self.members else None
        return newest if newest and newest.joined_at is None and newest.failed is None else None

    @property
    def live(self) -> bool:
        """Whether its processes may still run."""
        return self.outcome is None

    @property
    def ranks(self) -> int:
        """How many ranks it has."""
        return len(self.nodes) * self.ranks_per_node

    def generation_at(self, step: int | None) -> int:
        """The generation that made a step, as far as is known; None: before the first one."""
        joined = (m for m in self.members if m.step is not None and step is not None and step > m.step)
        return max((m.generation for m in joined), default=1)

    def nodes_in(self, generation: int) -> tuple[str, ...]:
        """The nodes of a generation of its membership."""
        later = (m.before for m in self.members if m.generation > generation)
        return next(later, self.nodes)

    def nodes_of(self, ranks: Iterable[int], generation: int | None = None) -> tuple[str, ...]:
        """The nodes on which these ranks run, each once; or ran, in an older generation of the membership.

        The attempt may not have a rank that its trainer names.
        """
        nodes = self.nodes if generation is None else self.nodes_in(generation)
        places = (rank // self.ranks_per_node for rank in ranks if self.ranks_per_node)
        return tuple(dict.fromkeys(nodes[place] for place in places if 0 <= place < len(nodes)))

    def ranks_on(self, nodes: Iterable[str]) -> tuple[int, ...]:
        """The ranks that have their place on these nodes."""
        there, each = set(nodes), self.ranks_per_node
        return tuple(
            rank
            for place, node in enumerate(self.nodes)
            if node in there
            for rank in range(place * each, (place + 1) * each)
        )

    def needed_since(self, node: str) -> float:
        """When ranks were first ordered to start on this node: with the attempt, or with the swap that brought it."""
        brought = (m.intended_at for m in self.members if node in m.nodes and node not in m.before)
        return max(brought, default=self.intended_at)

    def replaced_since(self, ended: RankExit) -> bool:
        """Whether another process has the place of this one now, or was ordered to take it."""
        return any(m.generation > ended.generation and ended.rank in m.new for m in self.members)
