"""Watches training: settings, telemetry through the detectors, checkpoints, and progress that does not come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.proof import enough_readbacks, planned_lr, with_settings
from opt_ops.core.detect.all import Detector, per_attempt
from opt_ops.core.detect.batch_size import BatchSizeDetector
from opt_ops.core.detect.corruption import CorruptionDetector
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.hang import PhaseTimes
from opt_ops.core.detect.history import CurveHistory
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.saves import StepTimes
from opt_ops.core.detect.throughput import slow_node
from opt_ops.core.detect.unplanned_lr import LearningRateDetector
from opt_ops.core.events import (
    AttemptConfigured,
    AttemptProgressed,
    CheckpointRefused,
    Event,
    SignalRaised,
)
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.health.findings import SLOWING
from opt_ops.core.schedule import PlannedLr
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import planned_changes
from opt_ops.core.state.queries import newest_good, suspended
from opt_ops.core.values import Readback, Tier
from opt_ops.ports import CheckpointStore, Clock, Trainer, TrainerPhase
from opt_ops.supervise.first_steps import FirstSteps
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.training_signals import digest_of, keeps_recurring, readback_of, signal_of
from opt_ops.supervise.watch_checkpoints import CheckpointWatch

_REPORT_SECONDS = 60.0  # between two reports of progress while nothing else happens


class TrainingWatch:
    """Follows the training of the newest attempt."""

    def __init__(
        self,
        policy: Policy,
        trainer: Trainer,
        checkpoints: CheckpointStore,
        clock: Clock,
        guard: Guard | None = None,
    ) -> None:
        """`guard`: the supervisor's, which tells of parts that fail."""
        self._policy = policy
        self._guard = guard or Guard(clock)
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._examinations = CheckpointWatch(checkpoints)
        self._clock = clock
        self._read: set[str] = set()
        self._following = ""
        self._ended_calm: set[str] = set()  # attempts
        self._curve = CurveHistory(lambda: LossDetector(policy.spike, policy.drift), self._observed)
        self._learning_rate = LearningRateDetector()
        self._batch_size = BatchSizeDetector()
        self._corruption = CorruptionDetector(0)
        self._per_attempt = self._new_detectors()
        self._phase_times = PhaseTimes()
        self._pinned_for: set[str] = set()  # keys of signals
        self._step_times = StepTimes()
        self._phase: TrainerPhase | None = None
        self._first: list[Point] = []
        self._first_steps = FirstSteps(self._enough)
        self._last: Point | None = None
        self._steps: int | None = None  # the last step that the attempt will train
        self._advanced_at = 0.0
        self._rest: tuple[float, float] | None = None
        """The newest time in which the attempt's job was suspended, seconds since the epoch."""
        self._reported_at = 0.0
        self._reported_step = 0
        self._generation = 1  # of the membership that made the last step
        self._readbacks = max((book.proof_steps for book in policy.playbooks.values()), default=1)

    def _new_detectors(self) -> tuple[Detector, ...]:
        policy = self._policy
        return per_attempt(policy.straggler, policy.loss_scale, policy.throughput)

    def observe(self, state: State) -> Iterator[Event]:
        """Yield events for everything that the trainer wrote since the last call."""
        attempt = state.attempt
        if attempt is not None and attempt.live:
            each = self._guard.each
            if attempt.name != self._following:
                self._follow(state, attempt)
            if self._first_steps.follow(attempt):  # it stood still until now
                self._advanced_at = self._clock.monotonic()
            if holder := suspended(state, attempt):
                self._advanced_at = self._clock.monotonic()
                self._rest = (holder.since, self._clock.now())
            self._guard.call("what was planned", lambda: self._plan(state, attempt), None)
            yield from each("the trainer's settings", lambda: self._config(state, attempt))
            for phase in each("phases", lambda: self._trainer.phases(attempt.name)):
                self._guard.call("phases", partial(self._enter, phase), None)
            for point in each("telemetry", lambda: self._trainer.points(attempt.name)):
                yield from each("telemetry", partial(self._take, state, attempt, point))
            yield from each("the last step", lambda: self._last_step(state, attempt))
            yield from each("progress", lambda: self._progress(state, attempt))
        judged = partial(self._examinations.observe, state, self._curve.detector.reason_not_healthy)
        yield from self._guard.each("checkpoints", judged)
        self._guard.call("pins of checkpoints", lambda: self._pin(state), None)

    def last(self, attempt: Attempt) -> Point | None:
        """The newest telemetry of the attempt; None if it is not the one that is followed."""
        return self._last if attempt.name == self._following else None

    @property
    def agreed(self) -> int:
        """The last step at which the checksums of all ranks agreed."""
        return self._corruption.agreed

    def idle_seconds(self, attempt: Attempt) -> float:
        """Seconds without progress of the attempt, as far as this daemon process knows."""
        return self._clock.monotonic() - self._advanced_at if attempt.name == self._following else 0.0

    def report_progress(self, attempt: Attempt) -> Iterator[Event]:
        """Yield the progress that is not journaled yet: what is journaled next is judged by it."""
        last = self.last(attempt)
        if last is not None and last.step > self._reported_step:
            yield self._report(attempt)

    def _follow(self, state: State, attempt: Attempt) -> None:
        """Begin a new attempt. The loss detector learns its bands from the kept steps that lead to it."""
        for earlier in state.attempts.values():
            if earlier.name == attempt.name:
                break
            if earlier.name not in self._read:
                begun = earlier.checkpoint.step if earlier.checkpoint else 0
                self._curve.remember_attempt(begun)
                self._learning_rate.begin(planned_lr(state, earlier), begun)
                for point in self._guard.each("telemetry", partial(self._trainer.points, earlier.name)):
                    self._curve.remember(point)
                    self._learning_rate.observe(point)
                self._read.add(earlier.name)
        self._read.add(attempt.name)
        if self._following and not self._curve.detector.spiking:
            self._ended_calm.add(self._following)
        self._following = attempt.name
        start = attempt.checkpoint.step if attempt.checkpoint else 0
        self._curve.begin_attempt(start)
        agreed = (p.step for p in reversed(self._curve.kept) if p.checksums is not None)
        self._corruption = CorruptionDetector(next(agreed, start + 1))
        self._learning_rate.begin(planned_lr(state, attempt), start)
        self._batch_size = BatchSizeDetector()
        self._per_attempt = self._new_detectors()
        self._phase_times = PhaseTimes()
        self._step_times = StepTimes()
        self._phase = None
        self._first, self._last, self._steps = [], None, None
        self._first_steps, self._generation = FirstSteps(self._enough), 1
        self._advanced_at = self._reported_at = self._clock.monotonic()
        self._reported_step = 0

    def _observed(self, detector: Detector, point: Point) -> list[Finding] | None:
        """What a detector finds at a point; None if the point breaks it."""
        return self._guard.call(f"the detector {type(detector).__name__}", partial(detector.observe, point), None)

    def _findings(self, detectors: Sequence[Detector], point: Point) -> Iterator[Finding]:
        """What the detectors find. One that the point breaks is built again without the point."""
        for detector in detectors:
            found = self._observed(detector, point)
            yield from found or ()
            if found is not None:
                continue
            if detector is self._corruption:
                self._corruption = CorruptionDetector(self._corruption.agreed)
            elif detector in self._per_attempt:
                pairs = zip(self._per_attempt, self._new_detectors(), strict=True)
                self._per_attempt = tuple(new if each is detector else each for each, new in pairs)

    def _restart(self, step: int) -> None:
        """The trainer, or another launcher, began again at `step`: the discarded steps do not count for the bands."""
        self._curve.restart(step)
        self._corruption = CorruptionDetector(min(self._corruption.agreed, step))
        self._reported_step = min(self._reported_step, step - 1)

    def _config(self, state: State, attempt: Attempt) -> Iterator[Event]:
        self._steps = attempt.steps
        if (config := self._trainer.config(attempt.name)) is None:
            return
        self._batch_size.asked = config.batch
        if attempt.schedule is not None:
            return
        self._steps = config.steps
        self._plan(state, replace(attempt, planned=config.planned, data=config.data))
        if planned_lr(state, attempt) is None:  # this is the lineage's first one that says what was asked for
            run = state.runs[attempt.run]
            schedule, _ = with_settings(config.schedule, config.optimizer, run.settings)
            self._learning_rate.plan(PlannedLr(schedule=schedule, factors=run.lr_factors))
        yield AttemptConfigured(
            attempt=attempt.name,
            steps=config.steps,
            schedule=config.schedule,
            optimizer=config.optimizer,
            versions=config.versions,
            layout=config.layout,
            planned=config.planned,
            data=config.data,
            dedup=config.dedup,
            capabilities=config.capabilities,
        )

    def _plan(self, state: State, attempt: Attempt) -> None:
        """Let the loss detector learn again from where something was planned."""
        for change in planned_changes(state, attempt):
            self._curve.plan(change.step)
        self._batch_size.planned = self._curve.planned

    def _take(self, state: State, attempt: Attempt, point: Point) -> Iterator[Event]:
        self._advanced_at = self._clock.monotonic()
        if self._last is not None and point.step <= self._last.step:
            self._restart(point.step)
        self._last = point
        if not self._enough(self._first):
            self._first.append(point)
        self._first_steps.take(point)
        rested = self._rests(point.ts - point.step_seconds, point.ts) or self._rejoins(attempt, point)
        # The first step compiles, allocates and connects. That and a step that was suspended are no typical time.
        if self._first[0] is not point and not rested:
            self._phase_times.observe("training", point.step_seconds)
            self._step_times.step(point)
        # An incident stands for what a point shows first: an unplanned learning rate explains what the loss does.
        findings = [*self._findings([self._learning_rate, self._batch_size], point), *self._on_curve(point)]
        findings += self._findings([self._corruption, *(() if rested else self._per_attempt)], point)
        for finding in findings:
            raised = signal_of(attempt, finding)
            if raised.key not in state.signals:
                yield from self._refused(attempt, raised)
                raised = self._with_onset(state, attempt, finding, raised)
                yield raised
                if keeps_recurring(state, raised, self._policy.spike.heal_steps, self._ended_calm):
                    rule = f"{raised.rule}, at the same step as in two attempts that ended before it had healed"
                    yield replace(raised, tier=Tier.ACT, rule=rule)
            named = self._with_slow_node(state, attempt, raised)
            if named is not None and named.key not in state.signals:
                yield named

    def _on_curve(self, point: Point) -> list[Finding]:
        """What the loss shows. Where the plan is known, the mere path of the learning rate says nothing more."""
        known = self._learning_rate.knows(point)
        if self._learning_rate.follows(point):
            self._curve.detector.expect_lr(point.step)
        return [f for f in self._curve.observe(point) if not (known and f.signal == FailureClass.UNPLANNED_LR)]

    @staticmethod
    def _refused(attempt: Attempt, raised: SignalRaised) -> Iterator[Event]:
        """Yield that the checkpoint of a bad restore must not be used again: the next attempt needs an older one."""
        if raised.signal == FailureClass.BAD_RESTORE and raised.tier is Tier.ACT and attempt.checkpoint is not None:
            why = f"attempt {attempt.name} began from it, and did not continue the loss that was reached"
            yield CheckpointRefused(checkpoint=attempt.checkpoint, why=why)

    def _last_step(self, state: State, attempt: Attempt) -> Iterator[Event]:
        """Yield a call for action on a spike that is open at the last step: it cannot heal any more."""
        if self._last is None or self._steps is None or self._last.step < self._steps:
            return
        if (found := self._curve.detector.open_spike(self._last)) is not None:
            raised = signal_of(attempt, found)
            if raised.key not in state.signals:
                yield self._with_onset(state, attempt, found, raised)

    def _with_onset(self, state: State, attempt: Attempt, finding: Finding, raised: SignalRaised) -> SignalRaised:
        """The signal with what telemetry shows around its onset, which tells causes apart."""
        first = self._first[0].step if self._first else None
        config = self._trainer.config(attempt.name)
        digest = partial(digest_of, state, attempt, finding, self._curve, first, config.batch if config else None)
        return replace(raised, onset=self._guard.call("the digest of an onset", digest, {}))

    def _with_slow_node(self, state: State, attempt: Attempt, raised: SignalRaised) -> SignalRaised | None:
        """A throughput drop with the node that causes it, if one stands out: a playbook can act on that."""
        if raised.signal != FailureClass.THROUGHPUT_DROP or not attempt.nodes:
            return None
        known = (node for name in attempt.nodes if (node := state.nodes.get(name)) is not None)
        slowing = {node.name: node.reason for node in known if node.reason in SLOWING}
        share = self._policy.throughput.share
        found = slow_node(raised.evidence, attempt.nodes, attempt.ranks_per_node, slowing, share)
        if found is None:
            return None
        node, why = found
        return replace(raised, tier=Tier.ACT, nodes=(node,), evidence={**raised.evidence, "why": why})

    def _progress(self, state: State, attempt: Attempt) -> Iterator[Event]:
        """Report the first step, the steps that a proof needs, then once a minute and once in each daemon process."""
        if self._last is None or self._last.step == self._reported_step:
            return
        proof = (self._enough(self._first) and not self._enough(attempt.readbacks)) or self._first_steps.news
        new = attempt.first_step is None or attempt.progress_epoch < state.epoch
        if proof or new or self._clock.monotonic() - self._reported_at >= _REPORT_SECONDS:
            yield self._report(attempt)

    def _enough(self, read: Sequence[Point] | Sequence[Readback]) -> bool:
        return enough_readbacks([each.lr for each in read], self._readbacks)

    def _report(self, attempt: Attempt) -> AttemptProgressed:
        assert self._last is not None
        self._reported_at, self._reported_step = self._clock.monotonic(), self._last.step
        known = len(attempt.readbacks) >= len(self._first)
        step_seconds, save_seconds, evaluation_seconds = self._step_times.account()
        return AttemptProgressed(
            attempt=attempt.name,
            first_step=self._first[0].step,
            first_step_at=self._first[0].ts,
            step=self._last.step,
            at=self._last.ts,
            readbacks=() if known else tuple(map(readback_of, self._first)),
            step_seconds=step_seconds,
            save_seconds=save_seconds,
            evaluation_seconds=evaluation_seconds,
            **self._first_steps.fields(),
        )

    def _enter(self, phase: TrainerPhase) -> None:
        before = self._phase
        if before is not None and before.name != "training" and not self._rests(before.since, phase.since):
            seconds = max(0.0, phase.since - before.since)
            self._phase_times.observe(before.name, seconds)
            if before.name == "evaluation":
                self._step_times.evaluation(seconds)
        self._phase = phase
        self._advanced_at = self._clock.monotonic()

    def _rests(self, began: float, ended: float) -> bool:
        """Whether the job was suspended meanwhile: the time is none of the trainer's."""
        return self._rest is not None and began <= self._rest[1] and ended >= self._rest[0]

    def _rejoins(self, attempt: Attempt, point: Point) -> bool:
        """Whether the step is the first one after ranks were replaced: its time is not a usual one, and neither are
        those of the ranks that left."""
        generation = attempt.generation_at(point.step)
        if generation != self._generation:
            self._generation, self._per_attempt = generation, self._new_detectors()
            return True
        return attempt.rejoining is not None

    def _phase_name(self, attempt: Attempt) -> str:
        """The phase that the trainer reports, or that follows from its steps."""
        if self._phase is not None:
            return self._phase.name
        if self._last is None:
            return "start"
        return "ending" if attempt.steps and self._last.step >= attempt.steps else "training"

    def hang(self, state: State, attempt: Attempt) -> Iterator[Event]:
        """Yield a signal, once, if the attempt has made no progress for too long."""
        rule, seconds, phase = self._policy.hang, self.idle_seconds(attempt), self._phase_name(attempt)
        timeout = self._phase_times.timeout(phase, rule)
        if self._first_steps.awaited:  # new ranks may compile something for it
            timeout = max(timeout, self._policy.in_place_seconds)
        if seconds <= timeout or attempt.stop_why is not None or attempt.rejoining is not None:
            return
        raised = SignalRaised(
            generation=attempt.generation,
            signal=FailureClass.HANG,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=self._last.step if self._last else None,
            onset_step=self._last.step if self._last else None,
            at=self._clock.now() - seconds,
            rule=f"no progress for {rule.multiple:g} × the phase's longest time (at least {rule.floor_seconds:g} s)",
            evidence={"seconds": seconds, "patience": timeout, "phase": phase},
        )
        if raised.key not in state.signals:
            yield from self.report_progress(attempt)
            yield raised

    def _pin(self, state: State) -> None:
        """Pin the checkpoint that a rollback would need: the last good one before the onset of each signal."""
        recent = list(state.attempts)[-2:]  # a new daemon process must not pin for signals of weeks ago
        for key, raised in state.signals.items():
            if key in self._pinned_for or raised.onset_step is None or raised.attempt not in recent:
                continue
            self._pinned_for.add(key)
            if known := newest_good(state, state.attempts[raised.attempt].run, raised.onset_step - 1):
                self._checkpoints.pin(known.checkpoint)
