"""Parameters of a simulated cluster: how long things take, what is trained, and the curve of the loss.

The defaults are those of a well-kept cluster of a few racks. A replay of a published record states its own numbers,
each with its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from opt_ops.contract.schedule import lr_of
from opt_ops.core.values import Optimizer, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """How long it takes to replace ranks while the others keep running, in seconds."""

    notice: float = 2.0  # from the death of a rank, or the order, until every survivor has left its collective
    peers: float = 4.0  # from the loss of a host until its peers see broken connections
    join: float = 12.0  # from the order until all ranks are in their new groups
    state: float = 3.0  # to copy the state to the new ranks, and to restore it on all
    warm: float = 60.0  # until a standby rank is ready
    copy: float = 0.0  # by which the copies of the state hold up each step


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How long things take, in seconds."""

    queue: float = 30.0  # from a submission to its nodes, if enough are free
    agent_start: float = 3.0  # from the nodes to the first heartbeat
    heartbeat: float = 2.0  # between two heartbeats of an agent
    obey: float = 0.5  # from new orders to the action of an agent
    rank_end: float = 1.0  # from SIGTERM to the end of a node's ranks
    abort: float = 2.0  # from the death of a rank to the death of its peers, by their broken collectives
    startup: float = 30.0  # of the ranks: imports, process groups, compilation
    load: float = 15.0  # of a checkpoint
    save: float = 0.2  # for which a checkpoint stops training
    commit: float = 10.0  # until a checkpoint is written and committed, in the background
    examine: float = 5.0  # to read a checkpoint
    evaluation: float = 0.0  # of one scheduled evaluation
    checkpoint_evaluation: float = 300.0  # of a checkpoint, in processes of its own
    cancel: float = 2.0  # from a cancellation to the end of the job
    node_timeout: float = 300.0  # until the scheduler marks a node as down that does not answer (SlurmdTimeout)
    warning: float = 120.0  # from the scheduler's notice to the time limit
    deliver: float = 1.0  # of an alert
    in_place: InPlace | None = None  # None: the trainer cannot do that, and peers die with a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """The cluster, and the training that runs on it."""

    seed: int = 1
    nodes: int = 4
    nodes_later: int = 0  # of them, the last ones, which come later
    gpus_per_node: int = 8
    can_drain: bool = True
    time_limit: float = 72 * 3600.0  # of a job, seconds
    steps: int = 1000
    step_seconds: float = 20.0
    full_nodes: int = 0  # on fewer nodes a step takes longer in proportion; 0: on any number the same
    save_every: int = 10  # steps
    checksum_every: int = 100  # steps between two comparisons of checksums; 0: never
    evaluate_every: int = 0  # steps; 0: never
    keep: tuple[tuple[int, int], ...] = ()
    """(age, spacing) in steps: of checkpoints older than the age, only those at the spacing are kept."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(peak_lr=1.2e-4, warmup_steps=100, total_steps=1000, final_fraction=0.1)
    )
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0))
    tokens_per_step: int = 2_000_000
    batch: int = 0  # sequences of an update; 0: telemetry does not say them, nor their place in the data
    loss_start: float = 11.0  # nats: a little above ln of a vocabulary of 50 thousand
    loss_end: float = 1.9
    loss_knee: float = 30.0  # steps, after which the loss follows its power law
    loss_power: float = 0.5
    loss_noise: float = 0.02  # standard deviation between batches, nats
    cooling: float = 0.05  # nats by which the loss falls if the learning rate falls to 0
    gnorm: float = 0.3
    gnorm_noise: float = 0.03  # relative

    def loss(self, step: int, lr_scale: float) -> float:
        """Return the healthy loss of update `step` in nats; `lr_scale` is the product of the factors in force."""
        decayed = (self.loss_start - self.loss_end) * (1.0 + step / self.loss_knee) ** -self.loss_power
        noise = self.loss_noise * normal(self.seed, step, 1)
        return self.loss_end + decayed - self.cooling * (1.0 - lr_scale) + noise

    def gradient_norm(self, step: int) -> float:
        """Return the healthy gradient norm of update `step`."""
        return self.gnorm * (1.0 + self.gnorm_noise * normal(self.seed, step, 2))

    def lr(self, step: int) -> float:
        """Return the learning rate at update `step`, as trainers compute it. The proofs compare it with their own.

        Raises:
            ValueError: the schedule is of a kind that cannot be computed.
        """
        lr = lr_of(_stated(self.schedule), (), step)
        if lr is None:
            raise ValueError(f"a schedule of the kind {self.schedule.kind!r} cannot be simulated")
        return lr

    @property
    def node_names(self) -> tuple[str, ...]:
        """The names of the nodes: `n001`, `n002` and so on."""
        return tuple(f"n{number:03d}" for number in range(1, self.nodes + 1))


@cache
def _stated(schedule: Schedule) -> Mapping[str, Any]:
    """The schedule as config.json states it."""
    return asdict(schedule)


_MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """Return 64 well-mixed bits of a number: one step of SplitMix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, number: int, stream: int) -> float:
    """Return a uniform pseudo-random number in [0, 1), a function of the arguments alone."""
    return _mixed(_mixed(seed * 1_000_003 + stream) ^ number) / 2.0**64


def normal(seed: int, number: int, stream: int) -> float:
    """Return a standard normal pseudo-random number, a function of the arguments alone (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(seed, number, stream)))
    return radius * math.cos(2.0 * math.pi * uniform(seed, number, stream + 1000))
