"""The loss on validation data: what the telemetry holds of each corpus, over all attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

from chronicles.kept_curve import AttemptCurve, kept_points


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusReport:
    """The kept evaluations of one corpus; losses in nats per token."""

    corpus: str
    evaluations: int
    step: int | None  # of the newest evaluation
    loss: float | None
    previous: float | None
    lowest: float | None
    lowest_step: int | None


def corpora(curves: Sequence[AttemptCurve]) -> list[str]:
    """The corpora that were ever evaluated, in the order of their first evaluation."""
    points = (point for curve in curves for point in curve.points)
    return list(dict.fromkeys(corpus for point in points for corpus in point.valid or ()))


def evaluated(curves: Sequence[AttemptCurve], corpus: str) -> list[AttemptCurve]:
    """The curves, reduced to the updates after which this corpus was evaluated."""
    return [replace(curve, points=[p for p in curve.points if p.valid and corpus in p.valid]) for curve in curves]


def corpus_reports(curves: Sequence[AttemptCurve]) -> list[CorpusReport]:
    """By corpus: the newest kept loss, the one before, and the lowest."""
    return [_report(corpus, evaluated(curves, corpus)) for corpus in corpora(curves)]


def _report(corpus: str, curves: Sequence[AttemptCurve]) -> CorpusReport:
    found = [(point.step, (point.valid or {})[corpus]) for _, point in kept_points(curves)]
    known = [(loss, step) for step, loss in found if loss is not None and isfinite(loss)]
    loss, step = known[-1] if known else (None, None)
    lowest, lowest_step = min(known, default=(None, None))
    return CorpusReport(
        corpus=corpus,
        evaluations=len(found),
        step=step,
        loss=loss,
        previous=known[-2][0] if len(known) > 1 else None,
        lowest=lowest,
        lowest_step=lowest_step,
    )
