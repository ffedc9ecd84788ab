"""The detector of everything that the loss and the gradient norm of one curve show.

One sum of evidence holds the loss against the best level that was reached, so that one fault calls for one action.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.gradient_norm import GradientNormDetector
from opt_ops.core.detect.loss_level import DriftRule, Level
from opt_ops.core.detect.loss_spike import Rise, SpikeRule, Verdict
from opt_ops.core.detect.lr_path import Change, LrPath, visible_change
from opt_ops.core.detect.noise import Noise, Scale
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.restore import RestoreCheck
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier

_KEPT = 256  # points, for what is declared late
_NEW_NORMAL = 128  # points after an action that nobody took: what nobody went back from is the new normal
_FINITE = 5  # points after which a run that was not finite is finite again
_HUGE_SD, _HUGE_SHARE = 20.0, 0.2
"""A rise right after a planned change is reported if it is this many sd, and this share of the loss."""
_GRADUAL = 8  # times `settle`, at most, that a planned change gets which still goes on; a jump is reported meanwhile
_FOLLOWS = 8  # lines within which the loss follows a visible change
_REACHED = 64  # points before an attempt, from which it is known what was reached: not in a run's first steps
_RESUMED = 32  # points of an attempt: a rise that begins so soon comes from its restore
_LR_POINTS = 256  # for which a learning rate that left its path upwards is evidence


class LossDetector:
    """Loss and gradient norm of one curve, in step order."""

    def __init__(self, rule: SpikeRule, drift: DriftRule | None = None) -> None:
        self._rule, self._drift = rule, drift or DriftRule()
        self._gnorm = GradientNormDetector(rule)
        self._lr = LrPath()
        self._lr_left = 0  # points for which it still counts
        self._lr_planned = 0  # the newest step whose learning rate is known to be the planned one
        self._bad: deque[tuple[int, int, str]] = deque(maxlen=512)  # first and last step, and why
        self._seen = 0  # the newest step
        self._kept: deque[Point] = deque(maxlen=_KEPT)  # with a finite loss
        self._planned: list[int] = []  # steps from which something was planned
        self._reached = False  # whether it was known what was reached when the attempt began
        self._change: tuple[Change, int] | None = None  # the last visible one, and how many points ago
        self._last: Point | None = None
        self._finite = _FINITE  # points in a row
        self._restore: RestoreCheck | None = None
        self._due: dict[int, float] = {}
        self._attempt_points = _RESUMED
        self._interval = 1
        self._settled = True
        self._learn_anew()

    def _learn_anew(self) -> None:
        self._noise = Noise()
        self._level = Level(self._drift)
        self._scale: Scale | None = None
        self._rise: Rise | None = None

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        if self._last is not None and point.step > self._last.step:
            self._interval = point.step - self._last.step
        self._seen = point.step
        if any(step <= point.step for step in self._planned):
            self._planned = [step for step in self._planned if step > point.step]
            self._change_was_planned()
        findings = self._path(point)
        if point.skip == "overflow":  # fp16's loss scale answers for it; its own detector tells when it cannot
            return findings
        if not point.finite or point.loss is None:
            return [*findings, *self._not_finite(point)]
        self._finite += 1
        self._attempt_points += 1
        self._kept.append(point)
        return [*findings, *self._restored(point, point.loss), *self._loss(point, point.loss)]

    def plan(self, step: int) -> None:
        """Something was planned from `step` on: from there, levels and bands are learned again. It may be declared
        late."""
        if step > self._seen:
            self._planned.append(step)
            return
        since = [point for point in self._kept if point.step >= step]
        self._change_was_planned()
        for point in since:
            if point.loss is not None:
                self._loss(point, point.loss)

    def begin_attempt(self, due: Sequence[Point]) -> None:
        """An attempt begins with the next point. `due` are the discarded points after its checkpoint, if there are any:
        the loss that they show is due again."""
        self._lr.expect_anew()
        self._last, self._change, self._finite = None, None, _FINITE
        self._due = {point.step: point.loss for point in due if point.loss is not None}
        self._attempt_points = 0
        losses = [point.loss for point in self._kept if point.loss is not None]
        self._reached = len(losses) >= _REACHED
        if self._scale is not None and self._reached:
            reached = median(losses[-8:])
            self._restore = RestoreCheck(reached, median(losses[-16:-8]) - reached, self._scale, due)

    def expect_lr(self, step: int) -> None:
        """The learning rate of the next point, `step`, is the planned one: wherever it goes, it is no evidence."""
        self._lr_planned = step

    @property
    def spiking(self) -> bool:
        """Whether the loss is in a spike."""
        return self._rise is not None and self._rise.told

    def open_spike(self, point: Point) -> Finding | None:
        """The spike that is open at `point`, the last one of a run: no step is left in which it could heal."""
        rise = self._rise
        if rise is None or not rise.told or rise.acted or rise.height <= 0:
            return None
        rise.acted = True
        return self._risen(point, rise, Tier.ACT, "out of its band at the last step of the run")

    def reason_not_healthy(self, step: int) -> str:
        """Why the state at `step` should not be gone back to; empty if nothing speaks against it."""
        rise = self._rise
        if rise is not None and rise.evidence >= self._rule.alert / 2 and step >= rise.onset.step:
            if step <= self._seen:
                return "the loss is above the level that it had reached"
            return f"the loss was above its level at step {self._seen}, and nothing came after that"
        return next((why for first, last, why in self._bad if first <= step <= last), "")

    # ---- the parts

    def _change_was_planned(self) -> None:
        self._learn_anew()
        self._settled = False
        self._lr.expect_anew()
        self._lr_left = 0
        self._change = None
        self._restore = None  # what was reached says nothing about what is planned

    def _path(self, point: Point) -> list[Finding]:
        """The learning rate's path, and what changes visibly."""
        found = self._lr.observe(point)
        if found and self._lr.left == point.step != self._lr_planned:
            self._lr_left = _LR_POINTS
        self._lr_left = max(0, self._lr_left - 1)
        change = visible_change(self._last, point) if self._last is not None else None
        if self._change is not None:
            self._change = self._change[0], self._change[1] + 1
        if change is not None and (self._change is None or self._change[1] > _FOLLOWS):
            self._change = change, 0  # what goes on changing began there
        self._last = point
        return found

    def _restored(self, point: Point, loss: float) -> list[Finding]:
        check = self._restore
        if check is None:
            return []
        found = check.observe(point, loss)
        if check.over or found is not None:
            self._restore = None
        if found is None:
            return []
        self._bad.append((found.onset_step, point.step, "the attempt began with another loss than was reached"))
        self._learn_anew()
        self._settled = False
        return [found]

    def _loss(self, point: Point, loss: float) -> list[Finding]:
        calm = self._rise is None or self._rise.evidence < self._rule.alert / 2
        if calm and self._noise.known:
            self._scale = self._noise.measure()
        found = self._gnorm.observe(point, point.gnorm, not calm) if point.gnorm is not None else []
        if point.gnorm is not None and self._gnorm.out:
            self._bad.append((point.step, point.step, "the gradient norm is out of its band"))
        if self._scale is not None and self._level.known:
            found += self._evidence(point, loss, self._scale)
        self._noise.add(loss, not self.spiking)
        found += self._level.observe(point, loss, self._scale, not self.spiking)
        if not self._settled:
            self._settle(loss)
        return found

    def _settle(self, loss: float) -> None:
        """After a change, the best is learned again at each doubling: a new stage may first go up, until it falls."""
        points, least = self._level.points, self._drift.settle
        if points < 16 or points & (points - 1):
            return
        rising = len(self._kept) > 64 and self._kept[-1].lr > self._kept[-64].lr
        gradual = self._rise is not None and self._rise.evidence >= self._rule.alert / 4 and not self._rise.told
        self._settled = points >= (2 if rising else 1) * least and (not gradual or points >= _GRADUAL * least)
        if self._rise is not None and (self._rise.told or self._is_huge(self._rise, loss)):
            return
        self._rise = None
        self._level.forget_best()

    @staticmethod
    def _is_huge(rise: Rise, loss: float) -> bool:
        return rise.height > max(_HUGE_SD * rise.scale.sd, _HUGE_SHARE * abs(loss))

    def _evidence(self, point: Point, loss: float, scale: Scale) -> list[Finding]:
        bound = self._level.bound(scale)
        rise = self._rise
        if rise is None:
            rise = Rise(self._rule, point, scale, resumed=self._attempt_points <= _RESUMED)
        elif rise.evidence < self._rule.alert / 2:
            rise.scale = scale
        rise.bound = bound
        rise.add(point, loss - bound, self._gnorm.evidence if point.gnorm is not None else 0.0)
        if rise.healed:
            self._end(rise)
            self._rise = None
            return []
        self._rise = rise
        if rise.acted:
            if rise.since_act >= _NEW_NORMAL:
                self._end(rise)
                self._learn_anew()
            return []
        jumped = rise.told or (rise.steep and self._level.points > self._drift.settle)
        if not self._settled and not jumped and not self._is_huge(rise, loss):
            return []
        return self._judged(point, rise)

    def _end(self, rise: Rise) -> None:
        """What was reported is over: nothing goes back to these steps."""
        if rise.told:
            self._bad.append((rise.onset.step, self._seen, "the loss was above the level that it had reached"))

    def _judged(self, point: Point, rise: Rise) -> list[Finding]:
        """What the evidence of a rise calls for."""
        found: list[Finding] = []
        if not rise.told and rise.evidence >= self._rule.alert:
            rise.told = True
            rise.kind = FailureClass.LOSS_SPIKE if rise.steep else FailureClass.LOSS_DRIFT
            if (change := self._at_onset(rise)) is not None and change.lr_factor <= 1.0:
                return [self._undeclared(point, rise, change)]
            found.append(self._risen(point, rise, Tier.ALERT, f"evidence {rise.evidence:.0f}"))
        act = self._rule.act / (2 if self._lr_left else 1)
        if not rise.told or rise.evidence < act:
            return found
        verdict = rise.verdict()
        if verdict is not Verdict.OPEN and not rise.grows and (change := self._at_onset(rise)) is not None:
            return [*found, self._undeclared(point, rise, change)]
        if verdict is not Verdict.STAYS:
            return found
        rise.acted = True
        steps = point.step - rise.onset.step
        return [
            *found,
            self._risen(point, rise, Tier.ACT, f"evidence {rise.evidence:.0f}, not healed in {steps} steps"),
        ]

    def _at_onset(self, rise: Rise) -> Change | None:
        """What changed visibly at the line at which the loss began to rise, or a few lines before."""
        if self._change is None or not -2 <= self._change[1] + 1 - rise.points <= _FOLLOWS:
            return None
        return self._change[0]

    def _undeclared(self, point: Point, rise: Rise, change: Change) -> Finding:
        text = f"{', '.join(change.what)} changed where the loss changed its level"
        finding = self._risen(point, rise, Tier.ACT, text)
        self._learn_anew()
        self._settled = False
        return replace(
            finding, signal=FailureClass.UNDECLARED_CHANGE, evidence={**finding.evidence, **change.what}, margin_steps=0
        )

    def _risen(self, point: Point, rise: Rise, tier: Tier, text: str) -> Finding:
        kind = rise.kind
        began = self._attempt_points - rise.points  # points of the attempt before the onset
        due = [self._due[step] - rise.bound for step in rise.steps if step in self._due]
        again = bool(due) and median(due) > rise.height / 2  # the discarded steps rose as much
        if (
            tier is Tier.ACT
            and self._reached
            and began < _RESUMED
            and not again
            and self._attempt_points <= 8 * _RESUMED
        ):
            kind, text = FailureClass.BAD_RESTORE, f"{text}; it began with the attempt's first points"
        return Finding(
            signal=kind,
            tier=tier,
            step=point.step,
            onset_step=rise.onset.step,
            at=rise.onset.ts,
            rule=f"above the best level: {text}",
            evidence={
                "loss": point.loss,
                "level": rise.bound + rise.height,
                "best": self._level.best,
                "median": self._level.best,
                "limit": rise.bound,
                "sd": rise.scale.sd,
                "evidence": round(rise.evidence, 1),
                "points": rise.points,
                "loss_at_onset": rise.onset.loss,
                "gnorm": point.gnorm,
                "lr": point.lr,
            },
            margin_steps=rise.margin(self._interval, self._level.low_step),
        )

    def _not_finite(self, point: Point) -> list[Finding]:
        """One finding for each time that numbers cease to be finite."""
        self._bad.append((point.step, point.step, "not finite"))
        again, self._finite = self._finite < _FINITE, 0
        if again:
            return []
        rise = self._rise
        onset, margin = point, 4 * self._interval
        if rise is not None:
            onset, margin = rise.onset, max(margin, rise.margin(self._interval, self._level.low_step))
        return [
            Finding(
                signal=FailureClass.NON_FINITE_LOSS,
                tier=Tier.ACT,
                step=point.step,
                onset_step=onset.step,
                at=onset.ts,
                rule="the loss or the gradient norm is not a finite number",
                evidence={"loss": point.loss, "gnorm": point.gnorm, "lr": point.lr, "bad_module": point.bad_module},
                margin_steps=margin,
            )
        ]
