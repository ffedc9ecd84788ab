"""Four sizes that were really trained: the fourth is forecast, a tenth of a nat is told, a healthy run is not.

`trained/` holds the losses of opt-200k, -500k, -1m and -2m at every update of 16 × 64 tokens of Python's standard
library. Each file is a campaign with its own seed; the seed is that of the data order, too. Warm-up: 60 updates.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pytest

from chronicles.campaign.beside import off_expected
from chronicles.campaign.law import SizeCurve, expect
from chronicles.campaign.sizes import SHARES, Settled, first_share, knots
from chronicles.campaign.watch import departure
from opt_ops.core.campaign.events import AlertKind
from opt_ops.core.campaign.values import Band

TRAINED = Path(__file__).with_name("trained")
TOKENS = 16 * 64

Campaign = tuple[list[list[Settled]], int, tuple[Band, ...]]


@pytest.fixture(scope="module", params=["1500-steps", "500-steps"])
def campaign(request: pytest.FixtureRequest) -> Campaign:
    """The steps of the sizes, the tokens of each, and what three of them let expect of the fourth."""
    with (TRAINED / f"{request.param}.csv").open() as file:
        _, *names = next(lines := csv.reader(file))
        rows = [(int(step), list(map(float, losses))) for step, *losses in lines]
    planned = rows[-1][0] * TOKENS
    sizes = [[Settled(step=n, tokens=n * TOKENS, loss=losses[i]) for n, losses in rows] for i in range(len(names))]
    first = first_share({"steps": rows[-1][0], "schedule": {"warmup_steps": 60}})
    shares = [share for share in SHARES if share >= first]
    known = [_curve(int(name), knots(steps, planned, first)) for name, steps in zip(names[:3], sizes, strict=False)]
    return sizes, planned, expect(known, int(names[3]), planned, shares).curve


def _curve(parameters: int, found: Sequence) -> SizeCurve:
    shares, tokens, losses = zip(*((each.share, each.tokens, each.loss) for each in found), strict=True)
    return SizeCurve(recipe=str(parameters), parameters=parameters, shares=shares, tokens=tokens, losses=losses)


def test_the_fourth_size_is_forecast_within_a_twentieth_of_a_nat(campaign: Campaign):
    sizes, planned, curve = campaign
    reached = knots(sizes[3], planned, 0.0)[-1].loss
    assert abs(reached - curve[-1].loss) < 0.05
    assert curve[-1].low < reached < curve[-1].high
    assert curve[-1].high - curve[-1].low < 0.15


def test_it_raises_nothing(campaign: Campaign):
    sizes, planned, curve = campaign
    assert departure(sizes[3], planned, curve, sizes[:3]) is None


@pytest.mark.parametrize("nats", [0.1, -0.1])
@pytest.mark.parametrize("since", [0.5, 0.6, 0.7, 0.8])
def test_a_tenth_of_a_nat_from_the_middle_on_is_told_within_a_tenth_of_the_steps(
    campaign: Campaign, nats: float, since: float
):
    sizes, planned, curve = campaign
    shifted = [replace(each, loss=each.loss + nats * (each.tokens > since * planned)) for each in sizes[3]]
    found = departure(shifted, planned, curve, sizes[:3])
    assert found is not None
    assert found.kind is (AlertKind.ABOVE if nats > 0 else AlertKind.BELOW)
    assert since < found.tokens / planned < since + 0.1
    assert not found.band.low <= found.loss <= found.band.high


def test_a_tenth_of_a_nat_above_from_the_first_step_on_is_told_within_a_tenth_of_the_steps(campaign: Campaign):
    sizes, planned, curve = campaign
    shifted = [replace(each, loss=each.loss + 0.1) for each in sizes[3]]
    found = departure(shifted, planned, curve, sizes[:3])
    assert found is not None
    assert found.kind is AlertKind.ABOVE
    assert found.tokens - curve[0].tokens < 0.1 * planned


def test_after_skipped_batches_the_others_saw_other_text_and_nothing_is_told(campaign: Campaign):
    """The losses of the text 20 updates on, from the middle: as far off the others as those of any other text."""
    sizes, planned, curve = campaign
    middle = len(sizes[3]) // 2
    moved = [
        replace(each, loss=sizes[3][min(i + 20, len(sizes[3]) - 1)].loss) if i > middle else each
        for i, each in enumerate(sizes[3])
    ]
    assert departure(moved, planned, curve, sizes[:3]) is None


def test_behind_its_planned_tokens_nothing_is_expected_of_a_size(campaign: Campaign):
    sizes, planned, curve = campaign
    last = sizes[3][-1]
    longer = [replace(last, step=last.step + n, tokens=planned + n * TOKENS, loss=2.0) for n in range(1, 200)]
    assert departure([*sizes[3], *longer], planned, curve, sizes[:3]) is None


def test_larger_batches_of_the_others_are_compared_on_the_same_text(campaign: Campaign):
    """Batches twice as large see the same text in half as many updates. Over two updates, the noise is gone again."""
    sizes, planned, curve = campaign
    larger = [
        [replace(b, loss=(a.loss + b.loss) / 2) for a, b in zip(steps[::2], steps[1::2], strict=True)]
        for steps in sizes[:3]
    ]

    def noise(others: Sequence[Sequence[Settled]]) -> float:
        off = off_expected(sizes[3], planned, curve, others)[len(sizes[3]) // 2 :]
        pairs = [(a + b) / 2 for a, b in zip(off[::2], off[1::2], strict=True)]
        return stdev(b - a for a, b in pairwise(pairs))

    assert noise(larger) < noise([]) / 4
