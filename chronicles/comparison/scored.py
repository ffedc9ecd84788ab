"""Scores that two lineages have in common: of each thing that both measured, the pair at the same or the nearest place.

A fork has its ancestors' scores, too, up to where it began. Those of the steps that both have in common are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from chronicles.comparison.family import Ancestor, Family, way
from chronicles.evaluations import ScoreReport, scores
from opt_ops.core.decide.scores import STANDARD_ERRORS, better, errors_between
from opt_ops.core.decide.scores import series as series_of

Scores = Mapping[tuple[Any, ...], list[ScoreReport]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What both lineages measured in the same way. Pairs are in their order.

    `difference`: the second minus the first. `errors`: the same in standard errors of the difference; None where one is
    not known. `certain`: whether it is more than noise. `better`: a lineage; None where the difference is not certain,
    or where it is not known which values of the metric are better.
    """

    task: str
    metric: str
    shots: int
    limit: int | None  # only so many documents were to be scored; None: all
    harness: str
    task_version: str
    run: tuple[str, str]
    step: tuple[int, int]
    value: tuple[float, float]
    stderr: tuple[float | None, float | None]
    n: tuple[int, int]
    difference: float
    errors: float | None
    certain: bool
    better: str | None
    pair: tuple[ScoreReport, ScoreReport] = field(metadata={"key": ""})


def scored(a: Family, b: Family, common: Ancestor | None, to: int | None, distance: Distance) -> list[Scored]:
    """The scores in common, as they were first measured by the first lineage.

    Args:
        a: The first lineage.
        b: The second one.
        common: Only scores behind it are compared.
        to: Only scores up to this step; None: all.
        distance: How far a step of the first lineage is from one of the second.
    """
    after = common.step if common is not None else -1
    found_a, found_b = (_scores(each, after, to) for each in (a, b))
    names = (a.lineage, b.lineage)
    return [_pair(names, *_nearest(of_a, found_b[key], distance)) for key, of_a in found_a.items() if key in found_b]


Distance = Callable[[int, int], float]


def _scores(of: Family, after: int, to: int | None) -> Scores:
    """By what was measured, the scores on the way of the present weights."""
    found: dict[tuple[Any, ...], dict[int, ScoreReport]] = {}
    for each in _on_the_way(of):
        if each.step > after and (to is None or each.step <= to):
            found.setdefault(series_of(each), {})[each.step] = each  # one that was saved again counts
    return {key: list(by_step.values()) for key, by_step in found.items()}


def _on_the_way(of: Family) -> Iterator[ScoreReport]:
    limits = dict(way(of))
    for record in reversed(of.records):
        for each in scores(record):
            limit = limits.get(each.run, -1)
            if (limit is None or each.step <= limit) and (each.settled or record is not of.own):
                yield each


def _nearest(a: list[ScoreReport], b: list[ScoreReport], distance: Distance) -> tuple[ScoreReport, ScoreReport]:
    """The pair whose places are nearest to each other; of several, the newest."""
    pairs = ((one, other) for one in a for other in b)
    return min(pairs, key=lambda pair: (distance(pair[0].step, pair[1].step), -pair[0].step, -pair[1].step))


def _pair(names: tuple[str, str], a: ScoreReport, b: ScoreReport) -> Scored:
    errors = errors_between(a, b)
    certain = errors is not None and abs(errors) > STANDARD_ERRORS
    direction = (better(a.metric) or 0) * (b.value - a.value)
    return Scored(
        task=a.task,
        metric=a.metric,
        shots=a.shots,
        limit=a.limit,
        harness=a.harness,
        task_version=a.task_version,
        run=(a.run, b.run),
        step=(a.step, b.step),
        value=(a.value, b.value),
        stderr=(a.stderr, b.stderr),
        n=(a.n, b.n),
        difference=b.value - a.value,
        errors=errors,
        certain=certain,
        better=names[direction > 0] if certain and direction else None,
        pair=(a, b),
    )
