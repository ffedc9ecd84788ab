"""How long a phase usually takes, and how long without progress is a hang."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from opt_ops.core.detect.finding import RobustWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class HangRule:
    """How long without progress is too long: `multiple` × the longest of the phase's last times, at least the floor."""

    multiple: float = 2.0
    floor_seconds: float = 30.0
    startup_seconds: float = 900.0  # where nothing is known yet


class PhaseTimes:
    """The last times of each phase: a step's for training, its whole length for every other."""

    def __init__(self) -> None:
        self._windows: defaultdict[str, RobustWindow] = defaultdict(lambda: RobustWindow(64))

    def observe(self, phase: str, seconds: float) -> None:
        """Take in a time."""
        self._windows[phase].add(seconds)

    def timeout(self, phase: str, rule: HangRule) -> float:
        """Seconds without progress after which the phase counts as hung."""
        window = self._windows[phase]
        if not len(window):
            return rule.startup_seconds
        return max(rule.floor_seconds, rule.multiple * window.largest)
