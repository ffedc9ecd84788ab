"""Compares two lineages: settings, curves, incidents, cost, and which has the lower loss at the same place.

The place is the step, or the number of tokens where the lineages have not seen as many tokens at the same step. Only
steps behind the nearest common ancestor are compared: those before it are the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from statistics import fmean, stdev

from chronicles.comparison.family import Ancestor, Family, common_ancestor, settled
from chronicles.comparison.scored import Distance, Scored, scored
from chronicles.comparison.settings import Setting, differences
from chronicles.ledger.summary import summarize
from chronicles.logbook.drawing.curves import thin
from chronicles.record import LineageRecord
from opt_ops.config import Rates
from opt_ops.runfolder.telemetry_curve import CurvePoint

MOST_POINTS = 1000  # of a curve
_PLACES = 10  # at which the losses are listed
_LAST = 50  # common steps whose mean decides: the noise of single batches is about averaged out
_CERTAIN = 2.0  # standard errors that a difference must exceed; 95 % of a normal distribution lie within 1.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The settled steps of a lineage, thinned; the first `inherited` of them are an ancestor's."""

    lineage: str
    step: Sequence[int]
    loss: Sequence[float | None]
    gnorm: Sequence[float | None]
    lr: Sequence[float | None]
    wps: Sequence[float | None]
    tokens: Sequence[int]
    inherited: int


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """The losses of both at the same place. `difference`: the second minus the first."""

    step: int  # of the first lineage
    tokens: int
    loss: tuple[float, float]

    difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The means over the last common steps. `noise`: the standard error of the difference, in nats per token.

    `better` is the lineage with the lower loss; None where the difference is within twice the noise.
    """

    step: int | None
    steps: int  # that the means are over
    loss: tuple[float | None, float | None]
    difference: float | None
    noise: float | None
    better: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Incidents:
    """What happened to a lineage, by failure class; drills are counted in it and apart."""

    lineage: str
    total: int
    drills: int
    by_kind: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a lineage has cost by the ledger: its own steps, not those that it inherited. None: not known."""

    lineage: str
    wall_seconds: float
    goodput: float | None
    node_hours: float | None
    steps_taken_back: int
    calls: int
    person_seconds: float
    kwh: float | None
    tco2e: float | None
    cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The item of `opt-ops/compare/1`; docs/formats.md has its fields."""

    lineages: tuple[str, str]
    common: Ancestor | None
    axis: str  # step, tokens
    settings: Sequence[Setting]
    curves: tuple[Curve, Curve]
    at: Sequence[At]
    verdict: Verdict
    scores: Sequence[Scored]
    incidents: tuple[Incidents, Incidents]
    cost: tuple[Cost, Cost]
    currency: str
    points: tuple[Sequence[CurvePoint], Sequence[CurvePoint]] = field(metadata={"key": ""})  # all settled ones
    inherited: tuple[int, int] = field(metadata={"key": ""})  # of `points`


def compare(a: Family, b: Family, rates: Rates | None = None, to: int | None = None) -> Comparison:
    """Compare two lineages, up to the step `to` if it is given."""
    rates = rates or Rates()
    points_a, inherited_a = _up_to(a, to)
    points_b, inherited_b = _up_to(b, to)
    common = common_ancestor(a, b)
    axis = "tokens" if _other_batches(points_a, points_b) else "step"
    pairs = (_by_tokens if axis == "tokens" else _by_step)(points_a, points_b, common.step if common else 0)
    names = (a.lineage, b.lineage)
    return Comparison(
        lineages=names,
        common=common,
        axis=axis,
        settings=differences((a, b)),
        curves=(_curve(names[0], points_a, inherited_a), _curve(names[1], points_b, inherited_b)),
        at=[_at(*pairs[i]) for i in _spread(len(pairs), _PLACES)],
        verdict=_verdict(names, [_at(*each) for each in pairs[-_LAST:]]),
        scores=scored(a, b, common, to, _distance(axis, points_a, points_b)),
        incidents=(_incidents(a), _incidents(b)),
        cost=(_cost(a.lineage, a.own, rates), _cost(b.lineage, b.own, rates)),
        currency=rates.currency,
        points=(points_a, points_b),
        inherited=(inherited_a, inherited_b),
    )


def _up_to(of: Family, to: int | None) -> tuple[list[CurvePoint], int]:
    """The settled steps up to a step, and how many of them are an ancestor's."""
    points, inherited = settled(of)
    kept = [point for point in points if to is None or point.step <= to]
    return kept, min(inherited, len(kept))


# ---- the same place on both curves


def _other_batches(a: Sequence[CurvePoint], b: Sequence[CurvePoint]) -> bool:
    """Whether the lineages have seen other numbers of tokens at the same step; False where that is not known."""
    tokens = {point.step: point.tokens for point in a if point.tokens}
    return any(tokens.get(point.step, point.tokens) != point.tokens for point in b if point.tokens)


_Pair = tuple[int, int, float, float]
"""A place on both curves: step and tokens of the first, the two losses."""


def _by_step(a: Sequence[CurvePoint], b: Sequence[CurvePoint], after: int) -> list[_Pair]:
    losses = {point.step: point.loss for point in a}
    return [
        (point.step, point.tokens, first, point.loss)
        for point in b
        if point.step > after and point.loss is not None and (first := losses.get(point.step)) is not None
    ]


def _by_tokens(a: Sequence[CurvePoint], b: Sequence[CurvePoint], after: int) -> list[_Pair]:
    """At each step of the first, with the loss that the second had after as many tokens: between two of its steps."""
    seen = [point for point in b if point.loss is not None and point.tokens]
    tokens = [point.tokens for point in seen]
    found: list[_Pair] = []
    for point in a:
        place = bisect_left(tokens, point.tokens)
        if point.step <= after or point.loss is None or place == len(tokens) or point.tokens < tokens[0]:
            continue
        high, low = seen[place], seen[max(0, place - 1)]
        share = (point.tokens - low.tokens) / (high.tokens - low.tokens) if high.tokens > low.tokens else 1.0
        loss = (low.loss or 0.0) + share * ((high.loss or 0.0) - (low.loss or 0.0))
        found.append((point.step, point.tokens, point.loss, loss))
    return found


def _at(step: int, tokens: int, a: float, b: float) -> At:
    return At(step=step, tokens=tokens, loss=(a, b), difference=b - a)


def _distance(axis: str, a: Sequence[CurvePoint], b: Sequence[CurvePoint]) -> Distance:
    """How far a step of the first lineage is from one of the second: in steps, or in tokens."""
    if axis == "step":
        return lambda one, other: abs(one - other)
    tokens_a, tokens_b = ({point.step: point.tokens for point in points if point.tokens} for points in (a, b))

    def distance(one: int, other: int) -> float:
        at = tokens_a.get(one), tokens_b.get(other)
        return inf if at[0] is None or at[1] is None else abs(at[0] - at[1])

    return distance


def _spread(size: int, most: int) -> list[int]:
    """At most `most` places of so many, evenly spread, the last one among them."""
    if size <= most:
        return list(range(size))
    return [(i + 1) * size // most - 1 for i in range(most)]


def _verdict(names: tuple[str, str], pairs: Sequence[At]) -> Verdict:
    if not pairs:
        return Verdict(step=None, steps=0, loss=(None, None), difference=None, noise=None, better=None)
    a, b = fmean(each.loss[0] for each in pairs), fmean(each.loss[1] for each in pairs)
    differences_ = [each.difference for each in pairs]
    noise = stdev(differences_) / sqrt(len(pairs)) if len(pairs) > 1 else None
    difference = fmean(differences_)
    certain = noise is not None and abs(difference) > _CERTAIN * noise
    return Verdict(
        step=pairs[-1].step,
        steps=len(pairs),
        loss=(a, b),
        difference=difference,
        noise=noise,
        better=names[difference < 0] if certain else None,
    )


# ---- a lineage


def _curve(lineage: str, points: Sequence[CurvePoint], inherited: int) -> Curve:
    chosen = thin([point.step for point in points], [point.loss or 0.0 for point in points], MOST_POINTS)
    shown = [points[i] for i in chosen]
    return Curve(
        lineage=lineage,
        step=[point.step for point in shown],
        loss=[point.loss for point in shown],
        gnorm=[point.gnorm for point in shown],
        lr=[point.lr for point in shown],
        wps=[point.wps or None for point in shown],
        tokens=[point.tokens for point in shown],
        inherited=sum(i < inherited for i in chosen),
    )


def _incidents(of: Family) -> Incidents:
    found = of.own.state.incidents.values()
    return Incidents(
        lineage=of.lineage,
        total=len(found),
        drills=sum(each.drill is not None for each in found),
        by_kind=dict(Counter(str(each.kind) for each in found).most_common()),
    )


def _cost(lineage: str, record: LineageRecord, rates: Rates) -> Cost:
    known = summarize(record, rates)
    return Cost(
        lineage=lineage,
        wall_seconds=known.wall_seconds,
        goodput=known.goodput,
        node_hours=known.resources.node_hours,
        steps_taken_back=known.steps_discarded,
        calls=known.involvement.pages,
        person_seconds=known.people.person_seconds,
        kwh=known.resources.kwh,
        tco2e=known.resources.tco2e,
        cost=known.resources.cost,
    )
