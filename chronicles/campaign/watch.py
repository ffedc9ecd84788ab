"""What in a campaign a person should look at: a loss outside its band, and sizes that differ in what must be equal.

It only tells. Each finding has an id of its own, so that it is journaled once, however often it is found.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import median
from typing import Any

from chronicles.campaign.sizes import CampaignRecord, Settled, SizeRecord, level
from chronicles.wording import short
from opt_ops.core.campaign.equal import differing, must_be_equal
from opt_ops.core.campaign.events import AlertKind, CampaignForecast
from opt_ops.core.campaign.values import Band

STAYS = 0.01
"""Share of the plan for which the settled loss must have left its band."""
_WINDOW = 0.01  # share of the plan whose level is the settled loss of a moment
_EVERY = 0.0025  # share of the plan between two looks
_LEAST_POINTS = 5
_REMEMBERED, _LEAST_WINDOWS = 20, 4  # windows whose differences say how large the noise of one is
_DEVIATIONS = 3.0

_WHY = {
    AlertKind.ABOVE: (
        "No spike detector sees this: the loss never jumped, it is only higher than the other sizes let expect. "
        "Compare how ranks share the model, the order of the data, and the learning rate with the size before"
    ),
    AlertKind.BELOW: (
        "A loss that is too good comes from text that was seen before: repeated data, or validation text in the "
        "training data. Look at dedup.json, and check the corpora with `python -m trainer.data.dedup --against`"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """The settled loss has left its band, and stayed outside."""

    kind: AlertKind
    step: int
    tokens: int
    loss: float
    band: Band


def departure(settled: Sequence[Settled], planned: int, curve: Sequence[Band]) -> Departure | None:
    """The first time at which the settled loss was outside its band for 1 % of the plan; None: it never was.

    A band is that of a single loss, and a run has a hundred windows. So a loss is outside only if it is beyond the band
    by more than three times the noise of the windows, as this run itself has shown it so far.
    """
    noise = _Noise()
    outside: Departure | None = None
    since = next_look = 0.0
    for i, each in enumerate(settled):
        if each.tokens < next_look or each.tokens < curve[0].tokens:
            continue
        next_look = each.tokens + _EVERY * planned
        begin = bisect_left(settled, each.tokens - _WINDOW * planned, hi=i, key=lambda known: known.tokens)
        window = settled[max(0, min(begin, i + 1 - _LEAST_POINTS)) : i + 1]
        if len(window) < _LEAST_POINTS:
            continue
        loss, band = level(window), band_at(curve, each.tokens)
        noise.add(window[0].tokens, each.tokens, loss - band.loss)
        room = noise.room
        kind = None
        if room is not None and not band.low - room <= loss <= band.high + room:
            kind = AlertKind.ABOVE if loss > band.high else AlertKind.BELOW
        if kind is None:
            outside = None
            continue
        if outside is None or outside.kind is not kind:
            since = each.tokens
        outside = Departure(kind=kind, step=each.step, tokens=each.tokens, loss=loss, band=band)
        if each.tokens - since >= (STAYS + _WINDOW) * planned:  # a window remembers what was before
            return outside
    return None


class _Noise:
    """By how much the levels of neighbouring windows differ that share no step."""

    def __init__(self) -> None:
        self._end: int | None = None
        self._level: float | None = None
        self._differences: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, begin: int, end: int, level: float) -> None:
        """Take in a window: its first and last tokens, and its level measured from what is expected."""
        if self._end is not None and begin <= self._end:
            return
        if self._level is not None:
            self._differences.append(abs(level - self._level))
        self._end, self._level = end, level

    @property
    def room(self) -> float | None:
        """Three standard deviations of a window's level; None: too few windows are known."""
        if len(self._differences) < _LEAST_WINDOWS:
            return None
        # 1.4826: from the median of absolute values to the standard deviation of a normal distribution
        return _DEVIATIONS * 1.4826 * median(self._differences) / sqrt(2)


def band_at(curve: Sequence[Band], tokens: float) -> Band:
    """The band after so many tokens: on a straight line between its neighbours, over logarithms."""
    place = bisect_left(curve, tokens, key=lambda each: each.tokens)
    a, b = curve[max(0, place - 1)], curve[min(place, len(curve) - 1)]
    share = log(tokens / a.tokens) / log(b.tokens / a.tokens) if b.tokens > a.tokens else 0.0
    share = min(1.0, max(0.0, share))

    def between(low: float, high: float) -> float:
        return exp(log(low) + share * (log(high) - log(low)))

    return Band(
        tokens=round(tokens), loss=between(a.loss, b.loss), low=between(a.low, b.low), high=between(a.high, b.high)
    )


def findings(campaign: CampaignRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is to be told: an id, and the arguments of a request `alert`."""
    yield from _differences(campaign)
    for size in campaign.sizes:
        if size.forecast is not None and size.member is not None:
            found = departure(size.settled, size.size.tokens, size.forecast.event.curve)
            if found is not None:
                yield _identifier(campaign, size, found.kind), _told(size, size.forecast.event, found)


def _told(size: SizeRecord, forecast: CampaignForecast, found: Departure) -> dict[str, Any]:
    band = found.band
    why = (
        f"At step {found.step:,} ({found.tokens:,} tokens) the settled loss {found.loss:.4f} has been {found.kind} its "
        f"band, {band.low:.4f} to {band.high:.4f}, for 1 % of the steps. {band.loss:.4f} was expected of "
        f"{', '.join(forecast.sizes)}. {_WHY[found.kind]}"
    )
    return {
        "kind": str(found.kind),
        "recipe": size.size.recipe,
        "why": why,
        "step": found.step,
        "tokens": found.tokens,
        "loss": found.loss,
        "low": band.low,
        "high": band.high,
    }


def _differences(campaign: CampaignRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sizes whose trainers say other data, tokenizers or settings than that of the first."""
    known = [(size, must_be_equal(size.config)) for size in campaign.sizes if size.config]
    for size, own in known[1:]:
        first, of_first = known[0]
        if differ := differing(of_first, own):
            named = "; ".join(
                f"{key} is {short(str(a), 40)} in {first.size.recipe} and {short(str(b), 40)} here"
                for key, a, b in differ
            )
            why = f"The law of the sizes holds only where they are equal in what the size does not decide. {named}"
            arguments = {"kind": str(AlertKind.SETTINGS), "recipe": size.size.recipe, "why": why[:4000]}
            yield _identifier(campaign, size, AlertKind.SETTINGS), arguments


def _identifier(campaign: CampaignRecord, size: SizeRecord, kind: AlertKind) -> str:
    return f"{kind}-{list(campaign.sizes).index(size) + 1}"
