"""The fit finds a known law again, and its band holds what a size that was left out comes to."""

import random

import pytest

from chronicles.campaign.law import SizeCurve, expect
from chronicles.campaign.sizes import SHARES
from tests.chronicles.campaign.made import LAW, SIZES, TOKENS


def sizes(draw: int, noise: float, kept: int = 4) -> list[SizeCurve]:
    """Curves whose every settled loss is off by itself."""
    rng = random.Random(draw)
    return [
        SizeCurve(
            recipe=str(size),
            parameters=size,
            shares=SHARES,
            tokens=[share * TOKENS for share in SHARES],
            losses=[LAW.loss(size, share * TOKENS) * (1 + noise * rng.gauss(0, 1)) for share in SHARES],
        )
        for size in SIZES[:kept]
    ]


@pytest.mark.parametrize("draws", [40, pytest.param(100, marks=pytest.mark.soak)])
def test_the_band_holds_the_largest_size_in_nine_of_ten_draws(draws: int):
    truth, held, widths = LAW.loss(SIZES[4], TOKENS), 0, []
    for draw in range(draws):
        end = expect(sizes(draw, 0.01), SIZES[4], TOKENS, SHARES).curve[-1]
        held += end.low <= truth <= end.high
        widths.append(end.high - end.low)
    assert held >= 0.9 * draws
    assert max(widths) < 0.2, "a band that holds everything says nothing"


def test_without_noise_the_law_is_found_again():
    found = expect(sizes(0, 0.0, kept=5), 2 * SIZES[4], TOKENS, SHARES)
    assert found.curve[-1].loss == pytest.approx(LAW.loss(2 * SIZES[4], TOKENS), abs=2e-3)
    assert (found.law.E, found.law.alpha, found.law.beta) == pytest.approx((LAW.E, LAW.alpha, LAW.beta), rel=0.05)
    assert found.points == 5 * len(SHARES)
    assert found.low.alpha <= found.law.alpha <= found.high.alpha


def test_the_same_curves_give_the_same_numbers():
    once, again = (expect(sizes(1, 0.01), SIZES[4], TOKENS, SHARES) for _ in range(2))
    assert once == again


def test_what_the_schedule_does_to_all_sizes_is_expected_of_the_next_one():
    """A decay of the learning rate at the end lowers all losses by 4 %, which the law cannot say."""

    def decayed(share: float) -> float:
        return 0.96 if share > 0.9 else 1.0

    known = [
        SizeCurve(
            recipe=each.recipe,
            parameters=each.parameters,
            shares=each.shares,
            tokens=each.tokens,
            losses=[loss * decayed(share) for loss, share in zip(each.losses, each.shares, strict=True)],
        )
        for each in sizes(2, 0.002)
    ]
    end = expect(known, SIZES[4], TOKENS, SHARES).curve[-1]
    assert end.loss == pytest.approx(0.96 * LAW.loss(SIZES[4], TOKENS), abs=0.03)
