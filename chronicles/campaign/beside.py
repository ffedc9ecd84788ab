"""A loss beside those of the other sizes on the same text.

All sizes of a campaign see the same samples in the same order. So the noise of their losses is nearly the same, and
what is left of it in the difference of two is small: of deviation σ·√(2·(1 − ρ)), with σ the deviation of one and ρ
their correlation. On tiny sizes that were really trained, ρ was 0.99, and the noise a ninth (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import exp, log
from statistics import fmean

from chronicles.campaign.sizes import SHARES, Settled, knots
from opt_ops.core.campaign.values import Band


def off_expected(
    settled: Sequence[Settled], planned: int, curve: Sequence[Band], others: Sequence[Sequence[Settled]]
) -> list[float]:
    """By how much the logarithm of each step's loss lies off what is expected of it.

    Args:
        settled: The steps of the size.
        planned: Its tokens.
        curve: What is expected of it on the way.
        others: The steps of sizes that the curve was fitted to and that have seen as many tokens: what they lost on the
            same text moves what is expected of a step. Empty: the curve alone counts.
    """
    difference = _difference(planned, curve, others)
    alone = settled if difference is None else settled[:1]  # there is no step before the first one
    found = [log(each.loss) - log(band_at(curve, each.tokens).loss) for each in alone]
    if difference is None:
        return found
    sums = [_sum(other) for other in others]
    for before, each in pairwise(settled):
        tokens = each.tokens - before.tokens
        same_text = fmean((total(each.tokens) - total(before.tokens)) / tokens for total in sums) if tokens > 0 else 0.0
        found.append(log(each.loss) - same_text - difference(each.tokens) if tokens > 0 else found[-1])
    return found


def band_at(curve: Sequence[Band], tokens: float) -> Band:
    """The band after so many tokens: on a straight line between its neighbours, over logarithms."""
    i, j, share = _neighbours([each.tokens for each in curve], tokens)

    def between(low: float, high: float) -> float:
        return exp(log(low) + share * (log(high) - log(low)))

    a, b = curve[i], curve[j]
    return Band(
        tokens=round(tokens), loss=between(a.loss, b.loss), low=between(a.low, b.low), high=between(a.high, b.high)
    )


def _neighbours(tokens: Sequence[float], seen: float) -> tuple[int, int, float]:
    """The places before and after `seen`, and how far it lies from the first to the second, over logarithms."""
    place = bisect_left(tokens, seen)
    i, j = max(0, place - 1), min(place, len(tokens) - 1)
    share = log(seen / tokens[i]) / log(tokens[j] / tokens[i]) if tokens[j] > tokens[i] else 0.0
    return i, j, min(1.0, max(0.0, share))


def _difference(
    planned: int, curve: Sequence[Band], others: Sequence[Sequence[Settled]]
) -> Callable[[float], float] | None:
    """How far the expected logarithm lies from the mean one of the others, by tokens; None: they are not comparable."""
    known = [{knot.share: knot.loss for knot in knots(other, planned, 0.0)} for other in others]
    shares = [share for share in SHARES if share * planned > curve[0].tokens - 1 and all(share in of for of in known)]
    if not known or SHARES[-1] not in shares:
        return None
    tokens = [share * planned for share in shares]
    values = [log(band_at(curve, share * planned).loss) - fmean(log(of[share]) for of in known) for share in shares]

    def at(seen: float) -> float:
        i, j, share = _neighbours(tokens, seen)
        return values[i] + share * (values[j] - values[i])

    return at


def _sum(other: Sequence[Settled]) -> Callable[[float], float]:
    """The sum over tokens of the logarithm of a size's loss, up to so many tokens. Batches may differ."""
    tokens = [0, *(each.tokens for each in other)]
    rates = [log(each.loss) for each in other]
    sums = [0.0, *accumulate(rate * (b - a) for rate, (a, b) in zip(rates, pairwise(tokens), strict=True))]

    def up_to(seen: float) -> float:
        place = min(bisect_left(tokens, seen, lo=1), len(rates))
        return sums[place - 1] + rates[place - 1] * (seen - tokens[place - 1])

    return up_to
