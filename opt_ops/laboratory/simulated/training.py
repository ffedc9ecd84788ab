"""The simulated trainer: one attempt's steps, losses, checkpoints and phases, made as time passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opt_ops.core.detect.point import Busy, ChecksumComparison, Point
from opt_ops.core.values import Checkpoint
from opt_ops.laboratory.simulated.costs import Costs, Physics
from opt_ops.ports import Launch, TrainerConfig, TrainerPhase

FOREVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A divergence: where it begins, and what it takes to be spared.

    A run that passes `step` with a learning rate above `cured_below` × the schedule, and with the batch of that step,
    diverges there; checkpoints written afterwards are of the diverged weights. With `relative`, the limit is that
    fraction of the learning rate with which it first came there: earlier cuts do not spare it.
    """

    step: int
    height: float = 3.0  # nats above the healthy loss, in the end
    steps: int = 40  # until it is nearly there
    lead: int = 4  # steps that the gradient norm rises before the loss
    cured_below: float = 0.8
    in_the_data: bool = False  # cured when the batch of `step` is skipped
    finite: bool = True  # False: the loss of `step` is not a number
    relative: bool = False
    rooted: int = 0  # weights of so many steps before are lost already: going back to them cures nothing


@dataclass(slots=True)
class StoredCheckpoint:
    """A checkpoint in the store."""

    checkpoint: Checkpoint
    divergence: Divergence | None  # of its weights
    damage: str = ""
    committed_at: float = 0.0
    scale: float = 1.0  # of the learning rate with which it was trained


@dataclass(slots=True)
class LossCurve:
    """What is wrong with the loss, by steps: the same for every attempt that passes there."""

    divergences: list[Divergence] = field(default_factory=list[Divergence])
    bumps: dict[int, float] = field(default_factory=dict[int, float])
    """Nats on top of the loss of a step, healing by themselves."""
    met: dict[int, float] = field(default_factory=dict[int, float])
    """With which scale of the learning rate the step of a sickness was first come to."""

    def strikes(self, divergence: Divergence, scale: float, skips: Sequence[tuple[int, int]]) -> bool:
        """Whether a run under these settings falls ill."""
        if divergence.in_the_data and any(first <= divergence.step <= last for first, last in skips):
            return False
        usual = self.met.setdefault(divergence.step, scale) if divergence.relative else 1.0
        return scale > divergence.cured_below * usual


@dataclass(frozen=True, slots=True)
class Command:
    """What a launch's argument list says."""

    folder: str
    resume: str | None
    lr_factors: tuple[tuple[int, float], ...]
    skips: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, argv: Sequence[str]) -> Command:
        """Read it as the trainer would; what the simulation has no use for is left out."""
        given: dict[str, list[str]] = {}
        for position, word in enumerate(argv):
            if word.startswith("--"):
                given.setdefault(word, []).extend(argv[position + 1 : position + 2])
        factors = (each.split(":") for each in given.get("--lr-factor", []))
        skips = (each.split(":") for each in given.get("--skip-batches", []))
        return cls(
            folder=given["--checkpoint-dir"][-1],
            resume=given["--resume"][-1] if "--resume" in given else None,
            lr_factors=tuple((int(step), float(factor)) for step, factor in factors),
            skips=tuple((int(first), int(last)) for first, last in skips),
        )


class Training:
    """One attempt. `advance` makes its steps up to a moment; nothing else moves it."""

    def __init__(self, launch: Launch, physics: Physics, costs: Costs, curve: LossCurve, epoch: float) -> None:
        """`epoch`, in seconds since 1970, is when virtual time began."""
        self.launch = launch
        self.command = Command.of(launch.argv)
        self.run = launch.attempt.partition("-")[0]
        self.points: list[Point] = []
        self.phases: list[TrainerPhase] = []
        self.config: TrainerConfig | None = None
        self.step = 0
        self.next_at = FOREVER  # when the next step ends
        self.over = False
        self.divergence: Divergence | None = None
        self._start: StoredCheckpoint | None = None
        self.save_asked = False
        self.drills: list[Mapping[str, Any]] = []
        self.flipped: int | None = None  # the rank whose data is corrupt
        self.slow: dict[str, float] = {}
        self.stacks: dict[str, dict[int, str]] = {}
        self.stuck_rank: int | None = None
        self.deaf = False  # whether that rank does not even answer a signal
        self._physics = physics
        self._costs = costs
        self._curve = curve
        self._epoch = epoch
        self._held_up = 0.0  # by the save before

    # ---- its course

    def begin(self, now: float, start: StoredCheckpoint | None) -> None:
        """The ranks are up and have loaded what they go on from: the first step begins."""
        self.step = start.checkpoint.step if start else 0
        self.divergence = start.divergence if start else None
        self._start = start
        self.next_at = now + self._seconds()

    def stall(self) -> None:
        """No step ends any more."""
        self.next_at = FOREVER

    def enter(self, name: str, since: float) -> None:
        """A phase begins at `since` (virtual seconds), which may lie a little ahead."""
        self.phases.append(TrainerPhase(name=name, since=self._epoch + since, step=self.step))

    def make_step(self) -> bool:
        """The step that is due ends. Returns whether a checkpoint is saved after it."""
        ended_at = self.next_at
        self.step += 1
        point = self._point(self._epoch + ended_at)
        self.points.append(point)
        if not point.finite or self.corrupt:
            self.stall()
            return False
        save = self.save_asked or self.step % self._physics.save_every == 0 or self.step == self._physics.steps
        self.save_asked = False
        at = ended_at
        self._held_up = self._costs.save if save else 0.0
        if save:
            self.enter("saving", at)
            at += self._costs.save
        every = self._physics.evaluate_every
        if every and self.step % every == 0:
            self.enter("evaluation", at)
            at += self._costs.evaluation
        if self.step >= self._physics.steps:
            self.enter("ending", at)
            self.stall()
        else:
            if at > ended_at or len(self.points) == 1:
                self.enter("training", at)
            self.next_at = at + self._seconds()
        return save

    # ---- its numbers

    @property
    def troubled(self) -> bool:
        """Whether the curve is not what it should be at the newest step or soon."""
        return self.divergence is not None or self.step + 1 in self._curve.bumps

    @property
    def corrupt(self) -> tuple[int, ...]:
        """The ranks whose data was found to be corrupt, with which training ends."""
        found = self.points[-1].checksums if self.points else None
        return found.ranks if found is not None else ()

    def lr_scale(self, step: int) -> float:
        """The product of the factors in force at update `step`."""
        scale = 1.0
        for start, factor in self.command.lr_factors:
            if start < step:
                scale *= factor
        return scale

    def _seconds(self) -> float:
        physics, nodes = self._physics, len(self.launch.nodes)
        shrunk = physics.full_nodes / nodes if physics.full_nodes > nodes else 1.0
        return physics.step_seconds * shrunk * max(self.slow.values(), default=1.0)

    def _drilled(self, step: int) -> float:
        factor = 1.0
        for drill in self.drills:
            if drill["kind"] == "lr" and drill["from_step"] <= step < drill["from_step"] + drill["updates"]:
                factor *= drill["factor"]
        return factor

    def _point(self, ts: float) -> Point:
        physics, step = self._physics, self.step
        scale = self.lr_scale(step)
        drilled = self._drilled(step)
        if self.divergence is None:
            self._fall_ill(step, scale, drilled)
        excess = self._curve.bumps.get(step, 0.0)
        gnorm, finite, ill = physics.gradient_norm(step), True, self.divergence
        if ill is not None:
            finite = ill.finite or step != ill.step
            excess += ill.height * (1.0 - 0.05 ** ((step - ill.step + 1) / ill.steps))
            gnorm *= 4.0
        elif coming := self._coming(step, scale):
            gnorm *= 1.0 + 0.5 * (step - coming.step + coming.lead + 1)
        seconds, optimizer = self._seconds() + self._held_up, physics.optimizer
        return Point(
            step=step,
            ts=ts,
            loss=physics.loss(step, scale) + excess if finite else None,
            gnorm=gnorm if finite else None,
            lr=physics.lr(step) * scale * drilled,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            clip_norm=optimizer.clip_norm,
            step_seconds=seconds,
            tokens=step * physics.tokens_per_step,
            wps=physics.tokens_per_step / seconds,
            finite=finite,
            save_seconds=self._held_up,
            busy=self._busy(),
            checksums=self._compared(step),
        )

    def _compared(self, step: int) -> ChecksumComparison | None:
        """After every so many steps, ranks look whether they hold the same; after a drill's flip at once."""
        every, flips = self._physics.checksum_every, [drill for drill in self.drills if drill["kind"] == "flip-bit"]
        struck = next((drill for drill in flips if drill["from_step"] < step), None)
        if not every or (struck is None and step % every != 1):
            return None
        rank = self.flipped if struck is None else int(struck["rank"])
        return (
            ChecksumComparison()
            if rank is None
            else ChecksumComparison((rank,), True, "its own shards changed between two updates")
        )

    def _busy(self) -> Busy:
        """How long ranks had work of their own: those of a slow node longer, everybody waits for them."""
        typical = self._physics.step_seconds
        if not self.slow:
            return Busy(median=typical, max=typical, rank=0)
        node = max(self.slow, key=lambda name: self.slow[name])
        rank = self.launch.nodes.index(node) * self.launch.ranks_per_node
        return Busy(median=typical, max=typical * self.slow[node], rank=rank)

    def _fall_ill(self, step: int, scale: float, drilled: float) -> None:
        if drilled > 4.0:
            self.divergence = Divergence(step=step)
            return
        for divergence in self._curve.divergences:
            if divergence.step == step and self._strikes(divergence, scale):
                self.divergence = divergence

    def _coming(self, step: int, scale: float) -> Divergence | None:
        for divergence in self._curve.divergences:
            if divergence.step - divergence.lead <= step < divergence.step and self._strikes(divergence, scale):
                return divergence
        return None

    def _strikes(self, divergence: Divergence, scale: float) -> bool:
        start, skips = self._start, self.command.skips
        if start is not None and start.checkpoint.step > divergence.step - divergence.rooted:
            scale = max(scale, start.scale)
        return self._curve.strikes(divergence, scale, skips)
