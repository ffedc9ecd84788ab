"""What in a campaign a person should look at: a loss outside its band, and sizes that differ in what must be equal.

It only tells. Each finding has an id of its own, so that it is journaled once, however often it is found.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log, sqrt
from statistics import fmean, median, stdev
from typing import Any

from chronicles.campaign.beside import band_at, off_expected
from chronicles.campaign.sizes import CampaignRecord, Settled, SizeRecord, knots, level, middle
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
_BLOCKS = 5  # of a window: where the other sizes have larger batches, steps alone are not compared on the same text
_DEVIATIONS = 3.0
_REACH = 0.1  # share of the plan, before a window, that says which level the loss had
_LEAST_LOOKS = 12  # in it
_SAME_PLAN = 0.01  # sizes with other plans are elsewhere in their schedules at the same tokens

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
    band: Band  # that it has left
    moved: bool  # that was the one around its own earlier level, not the one of the forecast


def departure(
    settled: Sequence[Settled], planned: int, curve: Sequence[Band], others: Sequence[Sequence[Settled]] = ()
) -> Departure | None:
    """The first time at which the settled loss was outside a band for 1 % of the plan; None: it never was.

    There are two bands: that of the forecast, and one half as wide around the level that the run itself had in the
    tenth of the plan before. A loss is outside only if it is beyond by more than the noise of the windows explains: a
    band is that of a single loss, and a run has a hundred windows.

    Args:
        settled: The steps of the size.
        planned: Its tokens.
        curve: What is expected of it on the way, with its band.
        others: The steps of the sizes that it is compared with on the same text, as in `off_expected`.
    """
    off = off_expected(settled, planned, curve, others)
    noise, earlier = _Noise(_noise_of(others, planned, curve[0].tokens)), _Earlier(planned)
    outside: Departure | None = None
    since = 0.0
    for begin, i in _looks(settled, planned, curve[0].tokens):
        each = settled[i]
        noise.add(settled[begin].tokens, each.tokens, off[begin : i + 1])
        now, loss = middle(off[begin : i + 1]), level(settled[begin : i + 1])
        found = _outside(band_at(curve, each.tokens), now, noise.room, earlier.level(each.tokens))
        earlier.add(each.tokens, now)
        if found is None:
            outside = None
            continue
        kind, moved, (low, expected, high) = found
        if outside is None or outside.kind is not kind:
            since = each.tokens
        scale = loss / exp(now)  # what was expected on the text of this window
        band = Band(tokens=each.tokens, loss=scale * exp(expected), low=scale * exp(low), high=scale * exp(high))
        outside = Departure(kind=kind, step=each.step, tokens=each.tokens, loss=loss, band=band, moved=moved)
        if each.tokens - since >= (STAYS + _WINDOW) * planned:  # a window remembers what was before
            return outside
    return None


def _looks(settled: Sequence[Settled], planned: int, first: int) -> Iterator[tuple[int, int]]:
    """The places of the first and the last step of each window that ends behind so many tokens."""
    next_look = float(first)
    for i, each in enumerate(settled):
        if each.tokens > planned * (1 + 1e-9):
            return  # a person has made the run longer: nothing is expected there
        if each.tokens < next_look:
            continue
        next_look = each.tokens + _EVERY * planned
        begin = bisect_left(settled, each.tokens - _WINDOW * planned, hi=i, key=lambda known: known.tokens)
        begin = max(0, min(begin, i + 1 - _LEAST_POINTS))
        if i + 1 - begin >= _LEAST_POINTS:
            yield begin, i


_Interval = tuple[float, float, float]
"""Low, expected, high: of a logarithm, measured from what is expected."""


def _outside(
    band: Band, now: float, room: float | None, earlier: float | None
) -> tuple[AlertKind, bool, _Interval] | None:
    """On which side the level of a window lies outside which band; whether that is the one around the earlier level."""
    if room is None:
        return None
    low, high = log(band.low / band.loss), log(band.high / band.loss)
    intervals: list[tuple[bool, _Interval]] = [(False, (low, 0.0, high))]
    if earlier is not None:
        half = (high - low) / 4
        intervals.append((True, (earlier - half, earlier, earlier + half)))
    for moved, interval in intervals:
        if not interval[0] - room <= now <= interval[2] + room:
            return AlertKind.ABOVE if now > interval[2] else AlertKind.BELOW, moved, interval
    return None


class _Noise:
    """How large the noise of a window's level is. `before`: its deviation, as long as too few windows are known."""

    def __init__(self, before: float | None = None) -> None:
        self._before = before
        self._end: int | None = None
        self._level = self._error = 0.0
        self._differences: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, begin: int, end: int, off: Sequence[float]) -> None:
        """Take in a window: its first and last tokens, and its losses, measured from what is expected."""
        edges = [len(off) * k // _BLOCKS for k in range(_BLOCKS + 1)]
        self._error = stdev(fmean(off[a:b]) for a, b in pairwise(edges)) / sqrt(_BLOCKS)
        if self._end is not None and begin <= self._end:
            return
        now = middle(off)
        if self._end is not None:
            self._differences.append(abs(now - self._level))
        self._end, self._level = end, now

    @property
    def deviation(self) -> float | None:
        """Between neighbouring windows that share no step; None: too few are known."""
        if len(self._differences) < _LEAST_WINDOWS:
            return self._before
        # 1.4826: from the median of absolute values to the standard deviation of a normal distribution
        return 1.4826 * median(self._differences) / sqrt(2)

    @property
    def room(self) -> float | None:
        """Three standard deviations of a window's level; None: too few windows are known.

        That between windows counts, and that within this one where it is larger: after skipped batches, the other sizes
        saw other text.
        """
        between = self.deviation
        return None if between is None else _DEVIATIONS * max(between, self._error)


def _noise_of(others: Sequence[Sequence[Settled]], planned: int, first: int) -> float | None:
    """The largest noise of one of the others beside the rest of them, behind so many tokens; None: there is no rest.

    It is known before a size has windows of its own, so a loss that is off from the beginning is told at once.
    """
    found: list[float | None] = []
    for i, other in enumerate(others if len(others) > 1 else ()):
        shown = knots(other, planned, (first - 1) / planned)
        own = [Band(tokens=round(x.share * planned), loss=x.loss, low=x.loss, high=x.loss) for x in shown]
        if not own:
            return None
        until = bisect_left(other, first + (_REMEMBERED + 2) * _WINDOW * planned, key=lambda known: known.tokens)
        off = off_expected(other[:until], planned, own, [*others[:i], *others[i + 1 :]])
        noise = _Noise()
        for begin, end in _looks(other[:until], planned, first):
            noise.add(other[begin].tokens, other[end].tokens, off[begin : end + 1])
        found.append(noise.deviation)
    known = [each for each in found if each is not None]
    return max(known) if known and len(known) == len(found) else None


class _Earlier:
    """The level of the tenth of the plan before a window."""

    def __init__(self, planned: int) -> None:
        self._planned = planned
        self._looks: deque[tuple[int, float]] = deque()

    def add(self, tokens: int, now: float) -> None:
        """Take in the level of a window that ends after so many tokens."""
        self._looks.append((tokens, now))
        while self._looks[0][0] < tokens - _REACH * self._planned:
            self._looks.popleft()

    def level(self, tokens: int) -> float | None:
        """What it was before the window that ends after so many tokens; None: too little is known."""
        before = [now for end, now in self._looks if end <= tokens - (STAYS + _WINDOW) * self._planned]
        return median(before) if len(before) >= _LEAST_LOOKS else None


def findings(campaign: CampaignRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is to be told: an id, and the arguments of a request `alert`."""
    yield from _differences(campaign)
    for size in campaign.sizes:
        if size.forecast is not None and size.member is not None:
            found = departure(size.settled, size.size.tokens, size.forecast.event.curve, _beside(campaign, size))
            if found is not None:
                yield _identifier(campaign, size, found.kind), _told(size, size.forecast.event, found)


def _beside(campaign: CampaignRecord, size: SizeRecord) -> list[Sequence[Settled]]:
    """The steps of the sizes that the forecast was made of and that have had as many tokens, to their end."""
    made_of = size.forecast.event.sizes if size.forecast else ()
    return [
        each.settled
        for each in campaign.sizes
        if each.size.recipe in made_of
        and each.reached is not None
        and abs(each.size.tokens / size.size.tokens - 1) < _SAME_PLAN
    ]


def _told(size: SizeRecord, forecast: CampaignForecast, found: Departure) -> dict[str, Any]:
    band, others = found.band, ", ".join(forecast.sizes)
    whose = (
        f"the band around its own level before, measured from {others} on the same text,"
        if found.moved
        else "its band,"
    )
    why = (
        f"At step {found.step:,} ({found.tokens:,} tokens) the settled loss {found.loss:.4f} has been {found.kind} "
        f"{whose} {band.low:.4f} to {band.high:.4f}, for 1 % of the steps. {band.loss:.4f} was expected"
        f"{'' if found.moved else f' of {others}'}. {_WHY[found.kind]}"
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
