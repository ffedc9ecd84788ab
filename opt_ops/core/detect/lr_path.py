"""The path of the learning rate where no recipe says what it must be: what leaves it, and what changes visibly."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.values import Tier

_FACTOR = 1.5  # between two lines: no schedule goes so far, but warm-up and the last steps of a decay to zero
_RISE = 1.05  # over its lowest since warm-up: schedules do not rise again
_STEADY = 8  # lines that show a pace, or that it is gone
_DONE = 0.2  # of the peak: below, a decay may end
_ZERO = 1e-3  # of the peak


@dataclass(frozen=True, slots=True)
class Change:
    """Something that telemetry shows to change at a line."""

    step: int
    what: dict[str, object]
    """`lr`, `batch`, `batch_tokens` or `stage`, with (before, after)."""
    lr_factor: float = 1.0


class LrPath:
    """The learning rate, line by line: warm-up, then a level or a fall that does not turn."""

    def __init__(self) -> None:
        self.left: int | None = None
        """Newest step at which it left its path upwards."""
        self._begin()

    def _begin(self) -> None:
        self._last: deque[Point] = deque(maxlen=2 * _STEADY + 1)
        self._warming = True
        self._peak, self._low = 0.0, float("inf")
        self._digit = float("inf")
        self._told: set[str] = set()
        self._lines = self._since_rise = self._still = 0

    def expect_anew(self) -> None:
        """Something was planned, or an attempt begins: the path may be another one."""
        self._begin()

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        last = self._last[-1] if self._last else None
        if last is not None and point.lr == last.lr == 0.0 and self._peak == 0.0:
            return []  # unknown
        why = self._leaves(point, last) if last is not None else ""
        self._last.append(point)
        self._lines += 1
        if not why:
            return []
        before = last.lr if last is not None else 0.0
        if point.lr > before:
            self.left = point.step
        onset = last if "no more" in why and last is not None else point
        finding = Finding(
            signal=FailureClass.UNPLANNED_LR,
            tier=Tier.ALERT,
            step=point.step,
            onset_step=onset.step,
            at=onset.ts,
            rule=why,
            evidence={"lr": point.lr, "planned_lr": before, "peak": self._peak, "loss": point.loss},
        )
        if "two lines" in why:
            peak = self._peak
            self._begin()
            self._peak = peak
            self._last.append(point)
        return [finding]

    def _leaves(self, point: Point, last: Point) -> str:
        """Why the new line is off the path; empty: it is on it."""
        lr, before = point.lr, last.lr
        change = lr - before
        rounding = 1.5 * self._digit if 1e-4 * max(lr, before) < self._digit < float("inf") else 0.0
        if change:
            self._digit = min(self._digit, abs(change))
        self._since_rise = 0 if lr > self._peak else self._since_rise + 1
        self._still = self._still + 1 if lr == before else 0
        text = ""
        if self._jumps(point, last, rounding):
            factor = lr / before if before else float("inf")
            text = f"the learning rate changed by a factor of {factor:.3g} between two lines"
        elif self._warming:
            if self._since_rise >= _STEADY:
                self._warming, self._low = False, lr
        elif lr > _RISE * self._low + rounding:
            text = self._once("rises", f"the learning rate rises after its warm-up, from {self._low:.3g} to {lr:.3g}")
        elif self._peak and lr < _ZERO * self._peak and before < _ZERO * self._peak:
            text = self._zero()
        elif self._still == _STEADY or (not self._still and self._lines % (_STEADY // 2) == 0):
            text = self._pace(point)
        self._peak = max(self._peak, lr)
        if not self._warming:
            self._low = min(self._low, lr)
        return text

    def _once(self, what: str, text: str) -> str:
        if what in self._told:
            return ""
        self._told.add(what)
        return text

    def _jumps(self, point: Point, last: Point, rounding: float) -> bool:
        """A factor that does not continue the last change."""
        lr, before = point.lr, last.lr
        small, large = min(lr, before), max(lr, before)
        if large < _FACTOR * small or large - small <= rounding:
            return False
        if self._warming and lr > before and self._peak <= before:
            # Warm-up multiplies the rate in its first lines. Later it goes on at its pace.
            return len(self._last) >= 3 and lr - before > 3 * abs(before - self._last[-2].lr) + rounding
        if len(self._last) < 2:
            return False
        span = last.step - self._last[-2].step
        pace = (before - self._last[-2].lr) / span if span else 0.0
        expected = before + pace * (point.step - last.step)
        return abs(lr - expected) > 0.25 * large and abs(lr - before) > 0.02 * self._peak

    def _zero(self) -> str:
        near = [p for p in self._last if p.lr < _ZERO * self._peak]
        if len(near) < _STEADY:
            return ""
        return self._once("zero", f"the learning rate is zero for {len(near)} lines, and training goes on")

    def _pace(self, point: Point) -> str:
        """A fall that stops far from its end, or that becomes twice as fast from one line to the next."""
        lines = [*self._last, point][-2 * _STEADY - 1 :]
        if len(lines) < 2 * _STEADY + 1:
            return ""
        first, middle, now = lines[0], lines[_STEADY], lines[-1]
        if now.lr < _DONE * self._peak or any(a.lr <= b.lr for a, b in pairwise(lines[: _STEADY + 1])):
            return ""
        earlier = (first.lr - middle.lr) / max(1, middle.step - first.step)
        later = (middle.lr - now.lr) / max(1, now.step - middle.step)
        if now.lr == middle.lr:
            return self._once("stuck", f"the learning rate falls no more, since step {middle.step}")
        if self._since_rise > 5 * _STEADY and later > 2 * earlier and first.lr - middle.lr > 4 * self._digit:
            return self._once("fast", f"the learning rate falls {later / earlier:.1f} times as fast as before")
        return ""


def visible_change(before: Point, now: Point) -> Change | None:
    """What the two lines show to be another stage of training, if anything."""
    if (now.lr, now.batch, now.batch_tokens, now.stage) == (before.lr, before.batch, before.batch_tokens, before.stage):
        return None
    what: dict[str, object] = {}
    for name in ("batch", "batch_tokens", "stage"):
        old, new = getattr(before, name), getattr(now, name)
        if old is not None and new is not None and old != new:
            what[name] = [old, new]
    factor = now.lr / before.lr if before.lr and now.lr else 1.0
    if factor >= _FACTOR or factor <= 1 / _FACTOR:
        what["lr"] = [before.lr, now.lr]
    return Change(now.step, what, factor) if what else None
