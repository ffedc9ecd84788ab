"""The simulated trainer: steps, losses, checkpoints and phases of one attempt, as time passes."""

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
    """A divergence: where it begins, and what prevents it.

    A run diverges at `step` if its learning rate is above `cured_below` × the schedule, and it trains the batch of that
    step. Later checkpoints hold the diverged weights. With `relative`, the limit is a fraction of the learning rate
    with which a run first reached that step: earlier cuts do not count.
    """

    step: int
    height: float = 3.0  # nats above the healthy loss, in the end
    steps: int = 40  # until nearly that height
    lead: int = 4  # steps by which the gradient norm rises before the loss
    cured_below: float = 0.8
    in_the_data: bool = False  # whether skipping the batch of `step` prevents it
    finite: bool = True  # False: the loss of `step` is not a number
    relative: bool = False
    rooted: int = 0  # number of steps before `step` whose weights diverge, too: a rollback to them cures nothing


@dataclass(slots=True)
class StoredCheckpoint:
    """A checkpoint in the simulated store."""

    checkpoint: Checkpoint
    divergence: Divergence | None  # in its weights
    damage: str = ""
    committed_at: float = 0.0
    scale: float = 1.0  # of the learning rate with which it was trained


@dataclass(slots=True)
class LossCurve:
    """What is wrong with the loss at which step, for every attempt that reaches it."""

    divergences: list[Divergence] = field(default_factory=list[Divergence])
    bumps: dict[int, float] = field(default_factory=dict[int, float])
    """Nats on top of the loss of a step."""
    met: dict[int, float] = field(default_factory=dict[int, float])
    """Scale of the learning rate with which the step of a divergence was first reached."""

    def strikes(self, divergence: Divergence, scale: float, skips: Sequence[tuple[int, int]]) -> bool:
        """Whether a run with these settings diverges."""
        if divergence.in_the_data and any(first <= divergence.step <= last for first, last in skips):
            return False
        usual = self.met.setdefault(divergence.step, scale) if divergence.relative else 1.0
        return scale > divergence.cured_below * usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoined:
    """A newer generation of an attempt's ranks that came together."""

    generation: int
    step: int  # whose state all ranks went on from
    stood_since: float  # end of the last step before, in virtual seconds
    at: float


@dataclass(frozen=True, slots=True)
class Command:
    """The options of a launch that the simulation uses."""

    folder: str
    resume: str | None
    lr_factors: tuple[tuple[int, float], ...]
    skips: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, argv: Sequence[str]) -> Command:
        """Parse the command line of a launch."""
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
    """The training of one attempt. Only `make_step` advances it."""

    def __init__(self, launch: Launch, physics: Physics, costs: Costs, curve: LossCurve, epoch: float) -> None:
        """`epoch` is the start of virtual time, in seconds since 1970."""
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
        self.unseen_from: int | None = None  # the step from which on telemetry never arrives
        self.deaf = False  # whether that rank does not answer a signal, either
        self.rejoined: list[Rejoined] = []
        self._physics = physics
        self._costs = costs
        self._curve = curve
        self._epoch = epoch
        self._held_up = 0.0  # seconds of the last save

    @property
    def generation(self) -> int:
        """Of its membership."""
        return self.rejoined[-1].generation if self.rejoined else 1

    # ---- steps

    def begin(self, now: float, start: StoredCheckpoint | None) -> None:
        """Begin the first step: the ranks are up and have loaded the checkpoint `start`."""
        self.step = start.checkpoint.step if start else 0
        self.divergence = start.divergence if start else None
        self._start = start
        self.next_at = now + self._seconds()

    def go_on(self, now: float, launch: Launch, slow: Mapping[str, float]) -> None:
        """Go on with the step after the last one: new ranks have taken the place of those that were lost."""
        assert launch.membership is not None
        generation, stood_since = launch.membership.generation, self.points[-1].ts - self._epoch
        self.rejoined.append(Rejoined(generation=generation, step=self.step, stood_since=stood_since, at=now))
        self.launch = launch
        self.slow = {node: factor for node, factor in slow.items() if node in launch.nodes and factor > 1.0}
        self.over, self.deaf, self.stuck_rank = False, False, None
        self.save_asked = True  # the first step after a recovery is saved
        self.next_at = now + self._seconds()

    def inject(self, drills: Sequence[Mapping[str, Any]]) -> None:
        """Take in the drills. One whose first step is past begins with the next update, as docs/formats.md says."""
        known = {drill.get("id") for drill in self.drills}
        for drill in drills:
            if drill.get("id") not in known:
                self.drills.append({**drill, "from_step": max(int(drill.get("from_step", 0)), self.step + 1)})

    def stall(self) -> None:
        """Stop all steps."""
        self.next_at = FOREVER

    def enter(self, name: str, since: float) -> None:
        """Begin a phase at `since` (virtual seconds), which may be a little ahead."""
        self.phases.append(TrainerPhase(name=name, since=self._epoch + since, step=self.step))

    def make_step(self) -> bool:
        """End the step that is due. Returns whether a checkpoint is saved after it."""
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

    # ---- numbers

    @property
    def troubled(self) -> bool:
        """Whether the loss is not healthy at the newest step or the next one."""
        return self.divergence is not None or self.step + 1 in self._curve.bumps

    @property
    def corrupt(self) -> tuple[int, ...]:
        """The ranks whose data is found to be corrupt; training ends with that."""
        found = self.points[-1].checksums if self.points else None
        return found.ranks if found is not None else ()

    def lr_scale(self, step: int) -> float:
        """Return the product of the learning-rate factors in force at update `step`."""
        scale = 1.0
        for start, factor in self.command.lr_factors:
            if start < step:
                scale *= factor
        return scale

    def _seconds(self) -> float:
        physics, nodes = self._physics, len(self.launch.nodes)
        shrunk = physics.full_nodes / nodes if physics.full_nodes > nodes else 1.0
        copy = self._costs.in_place.copy if self._costs.in_place else 0.0
        return physics.step_seconds * shrunk * max(self.slow.values(), default=1.0) + copy

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
            self._diverge(step, scale, drilled)
        excess = self._curve.bumps.get(step, 0.0)
        gnorm, diverged = physics.gradient_norm(step), self.divergence
        finite = not any(drill["kind"] == "nan" and drill["from_step"] == step for drill in self.drills)
        if diverged is not None:
            finite = finite and (diverged.finite or step != diverged.step)
            excess += diverged.height * (1.0 - 0.05 ** ((step - diverged.step + 1) / diverged.steps))
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
            batch=physics.batch or None,
            data_position=step * physics.batch or None,
        )

    def _compared(self, step: int) -> ChecksumComparison | None:
        """Compare checksums after every `checksum_every` steps, and at once after the flip of a drill."""
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
        """Busy times of the ranks: those of a slow node are busy longer, and the others wait for them."""
        typical = self._physics.step_seconds
        if not self.slow:
            return Busy(median=typical, max=typical, rank=0)
        node = max(self.slow, key=lambda name: self.slow[name])
        rank = self.launch.nodes.index(node) * self.launch.ranks_per_node
        return Busy(median=typical, max=typical * self.slow[node], rank=rank)

    def _diverge(self, step: int, scale: float, drilled: float) -> None:
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
