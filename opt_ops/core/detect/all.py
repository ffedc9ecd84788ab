"""The one list of detectors over an attempt's telemetry."""

from __future__ import annotations

from typing import Protocol

from opt_ops.core.detect.activations import ActivationDetector
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss_scale import LossScaleDetector, LossScaleRule
from opt_ops.core.detect.point import Point
from opt_ops.core.detect.saves import SaveDetector
from opt_ops.core.detect.straggler import StragglerDetector, StragglerRule
from opt_ops.core.detect.throughput import ThroughputDetector, ThroughputRule
from opt_ops.core.detect.update_norm import UpdateNormDetector


class Detector(Protocol):
    """Takes in telemetry line by line. Deterministic, with bounded work and memory for each line."""

    def observe(self, point: Point) -> list[Finding]:
        """Take in the next line; what it makes known."""
        ...


def of_the_model(loss_scale: LossScaleRule) -> tuple[Detector, ...]:
    """Those of `per_attempt` that watch the model and its optimizer, not machines: a replay runs them, too."""
    return (LossScaleDetector(loss_scale), ActivationDetector(), UpdateNormDetector())


def per_attempt(
    straggler: StragglerRule, loss_scale: LossScaleRule, throughput: ThroughputRule
) -> tuple[Detector, ...]:
    """Those that start empty with every attempt.

    Two more follow the curve over attempts and are kept by the watcher: `LossDetector`, which learns its bands from all
    kept steps, and `CorruptionDetector`, which knows since when ranks agree.
    """
    return (
        *of_the_model(loss_scale),
        StragglerDetector(straggler),
        ThroughputDetector(throughput),
        SaveDetector(),
    )
