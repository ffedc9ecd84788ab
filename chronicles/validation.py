"""The loss on validation data: what the telemetry holds of each corpus, over all attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from chronicles.kept_curve import AttemptCurve, kept_points


def corpora(parts: Sequence[AttemptCurve]) -> list[str]:
    """The corpora that were ever evaluated on, the first one first."""
    points = (point for part in parts for point in part.points)
    return list(dict.fromkeys(corpus for point in points for corpus in point.valid or ()))


def evaluated(parts: Sequence[AttemptCurve], corpus: str) -> list[AttemptCurve]:
    """The attempts with the updates alone after which this corpus was evaluated."""
    return [replace(part, points=[p for p in part.points if p.valid and corpus in p.valid]) for part in parts]


def report(parts: Sequence[AttemptCurve]) -> list[dict[str, Any]]:
    """By corpus: its newest loss that counts, the one before, and the lowest; nats per token."""
    return [_row(corpus, evaluated(parts, corpus)) for corpus in corpora(parts)]


def _row(corpus: str, parts: Sequence[AttemptCurve]) -> dict[str, Any]:
    found = [(point.step, (point.valid or {})[corpus]) for _, point in kept_points(parts)]
    known = [(loss, step) for step, loss in found if loss is not None and isfinite(loss)]
    loss, step = known[-1] if known else (None, None)
    lowest, lowest_step = min(known, default=(None, None))
    return {
        "corpus": corpus,
        "evaluations": len(found),
        "step": step,
        "loss": loss,
        "previous": known[-2][0] if len(known) > 1 else None,
        "lowest": lowest,
        "lowest_step": lowest_step,
    }
