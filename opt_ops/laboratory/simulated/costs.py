"""What a simulated cluster is like: how long things take, what is trained on what, and the curve of the loss.

Every number is a parameter. The defaults are those of a well-kept cluster of the size of a few racks; a replay of a
published record states its own, each with its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from opt_ops.core.values import Optimizer, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How long things take, in seconds."""

    queue: float = 30.0  # from a submission until its nodes are given, where enough are free
    agent_start: float = 3.0  # from the nodes to the first heartbeat
    heartbeat: float = 2.0  # between two of an agent
    obey: float = 0.5  # from the orders to what an agent does about them
    rank_end: float = 1.0  # from SIGTERM to the end of a node's ranks
    abort: float = 2.0  # from the death of a rank to that of its peers, by their broken collectives
    startup: float = 30.0  # of the ranks: imports, process groups, compilation
    load: float = 15.0  # of a checkpoint
    save: float = 0.2  # that a checkpoint holds training up
    commit: float = 10.0  # until a checkpoint is written and committed, beside training
    examine: float = 5.0  # to read a checkpoint back
    evaluation: float = 0.0  # of one scheduled evaluation
    cancel: float = 2.0  # from a cancellation to the end of the job
    node_timeout: float = 300.0  # until the scheduler gives a node up that does not answer (SlurmdTimeout)
    warning: float = 120.0  # between the scheduler's warning signal and the time limit
    deliver: float = 1.0  # of an alert


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """What the cluster is made of, and what is trained on it."""

    seed: int = 1
    nodes: int = 4
    nodes_later: int = 0  # of them, that are not there yet: the last ones
    gpus_per_node: int = 8
    can_drain: bool = True
    time_limit: float = 72 * 3600.0  # of a job, seconds
    steps: int = 1000
    step_seconds: float = 20.0
    full_nodes: int = 0  # on fewer nodes a step takes longer in proportion; 0: it does not
    save_every: int = 10  # steps
    checksum_every: int = 100  # steps between two looks at what ranks hold alike; 0: never
    evaluate_every: int = 0  # steps; 0: never
    keep: tuple[tuple[int, int], ...] = ()
    """Checkpoints that are kept: (age in steps, spacing in steps). Above each age, only those at its spacing."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(peak_lr=1.2e-4, warmup_steps=100, total_steps=1000, final_fraction=0.1)
    )
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0))
    tokens_per_step: int = 2_000_000
    loss_start: float = 11.0  # nats: ln of a vocabulary of 50 thousand, and a little
    loss_end: float = 1.9
    loss_knee: float = 30.0  # steps after which the loss begins to follow its power law
    loss_power: float = 0.5
    loss_noise: float = 0.02  # standard deviation between batches, nats
    cooling: float = 0.05  # nats by which the loss is lower per unit of learning rate taken away
    gnorm: float = 0.3
    gnorm_noise: float = 0.03  # relative

    def loss(self, step: int, lr_scale: float) -> float:
        """The loss of update `step` when all is well, in nats; `lr_scale` is the product of the factors in force."""
        settled = (self.loss_start - self.loss_end) * (1.0 + step / self.loss_knee) ** -self.loss_power
        noise = self.loss_noise * normal(self.seed, step, 1)
        return self.loss_end + settled - self.cooling * (1.0 - lr_scale) + noise

    def gradient_norm(self, step: int) -> float:
        """The gradient norm of update `step` when all is well."""
        return self.gnorm * (1.0 + self.gnorm_noise * normal(self.seed, step, 2))

    def lr(self, step: int) -> float:
        """The schedule of docs/formats.md at update `step`; the proofs compare it with the supervisor's own."""
        schedule = self.schedule
        if step < schedule.warmup_steps:
            return schedule.peak_lr * step / schedule.warmup_steps
        span = schedule.total_steps - schedule.warmup_steps
        decayed = min(step - schedule.warmup_steps, span) / span
        return schedule.peak_lr * (1.0 - (1.0 - schedule.final_fraction) * decayed)

    @property
    def node_names(self) -> tuple[str, ...]:
        """The nodes: `n001`, `n002` and so on."""
        return tuple(f"n{number:03d}" for number in range(1, self.nodes + 1))


_MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): 64 well-mixed bits of any number."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, number: int, stream: int) -> float:
    """A number in [0, 1) that looks random and is a function of its arguments alone."""
    return _mixed(_mixed(seed * 1_000_003 + stream) ^ number) / 2.0**64


def normal(seed: int, number: int, stream: int) -> float:
    """A standard normal number that is a function of its arguments alone (Box and Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(seed, number, stream)))
    return radius * math.cos(2.0 * math.pi * uniform(seed, number, stream + 1000))
