"""A loss outside its band for one percent of the steps is told within a tenth of the steps; a healthy one is not."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.signals_curves import NOISES
from chronicles.campaign.beside import band_at
from chronicles.campaign.law import expect
from chronicles.campaign.sizes import SHARES, CampaignRecord, Settled, SizeRecord, knots
from chronicles.campaign.watch import departure, findings
from opt_ops.core.campaign.events import AlertKind, CampaignForecast
from opt_ops.core.campaign.state import CampaignState, Forecast, Member
from opt_ops.core.campaign.values import Band, Law, Size
from opt_ops.core.values import Shape
from tests.chronicles.campaign.made import LAW, SIZES, TOKENS, curve, settled

NEXT = SIZES[4]
QUIET = ("correlated", "global batch", "heavy tails", "outliers", "skewed")
"""Noises in whose windows of 15 steps a tenth of a nat stands out."""


@pytest.fixture(scope="module")
def expected() -> tuple[Band, ...]:
    """What four sizes let expect of the fifth."""
    return expect([curve(size, settled(size, size)) for size in SIZES[:4]], NEXT, TOKENS, SHARES).curve


@pytest.mark.parametrize("nats", [0.1, -0.1])
@pytest.mark.parametrize("since", [0.0, 0.3, 0.7])
def test_a_tenth_of_a_nat_is_told_within_a_tenth_of_the_steps(expected, nats: float, since: float):
    steps = settled(NEXT, 5, more=lambda share: nats if share >= since else 0.0)
    found = departure(steps, TOKENS, expected)
    assert found is not None
    assert found.kind is (AlertKind.ABOVE if nats > 0 else AlertKind.BELOW)
    first = max(since, expected[0].tokens / TOKENS)  # before it, nothing is expected
    assert first * len(steps) <= found.step <= (first + 0.1) * len(steps)


def test_healthy_runs_raise_nothing(expected):
    for seed in range(20):
        assert departure(settled(NEXT, seed), TOKENS, expected) is None, seed


@pytest.mark.parametrize("noise", sorted(NOISES))
def test_no_kind_of_noise_of_a_healthy_run_raises_it(noise: str):
    """The noises of the curves on which the detectors are judged: heavy tails, correlated, by source, outliers."""
    for seed in range(2):
        others = [noisy(size, noise, seed) for size in SIZES[:4]]
        band = expect(list(map(curve, SIZES, others)), NEXT, TOKENS, SHARES).curve
        healthy = noisy(NEXT, noise, seed)
        assert departure(healthy, TOKENS, band) is None, (noise, seed)
        assert departure(healthy, TOKENS, band, others) is None, (noise, seed)
        if noise not in QUIET:
            continue
        begins = len(healthy) // 2
        shifted = [replace(each, loss=each.loss + 0.1 * (each.step > begins)) for each in healthy]
        found = departure(shifted, TOKENS, band)
        assert found is not None, (noise, seed)
        assert (found.kind, begins < found.step <= begins + len(healthy) // 10) == (AlertKind.ABOVE, True)


def noisy(size: int, noise: str, seed: int) -> list[Settled]:
    """A size with a kind of noise: of the same looks for all sizes with this seed, and drawn anew for each."""
    make, low, high = NOISES[noise]
    rng = random.Random(seed)
    draw = make(rng, (low * high) ** 0.5, 1)
    rng.seed(f"{seed} {size}")
    return [replace(each, loss=each.loss + draw()) for each in settled(size, seed, noise=0.0)]


def test_a_spike_that_heals_is_not_told(expected):
    steps = settled(NEXT, 3, more=lambda share: 1.0 if 0.5 < share < 0.505 else 0.0)
    assert departure(steps, TOKENS, expected) is None


def test_the_band_between_two_of_its_knots():
    curve = (Band(tokens=100, loss=4.0, low=3.0, high=5.0), Band(tokens=400, loss=1.0, low=0.75, high=1.25))
    middle = band_at(curve, 200)
    assert (middle.loss, middle.low, middle.high) == pytest.approx((2.0, 1.5, 2.5))
    assert band_at(curve, 4000).loss == pytest.approx(1.0)
    assert LAW.loss(NEXT, TOKENS) > LAW.E


def member(recipe: str, place: int, digest: str, steps: Sequence[Settled], band: tuple[Band, ...] = ()) -> SizeRecord:
    """A size that has trained these steps; with a band, it has a forecast of the four sizes before it."""
    sizes, tokens = ("first", "second", "third", "fourth"), TOKENS
    law = Law(E=1.0, A=1.0, alpha=1.0, B=1.0, beta=1.0)
    event = CampaignForecast(
        request="f", recipe=recipe, tokens=tokens, loss=2.0, low=1.0, high=3.0, points=96, sizes=sizes,
        fit=law, fit_low=law, fit_high=law, curve=band,
    )  # fmt: skip
    return SizeRecord(
        size=Size(
            recipe=recipe,
            parameters=SIZES[place],
            tokens=tokens,
            settings=(),
            shape=Shape(nodes=1, spares=0, ranks_per_node=1),
        ),
        member=Member(recipe=recipe, lineage=str(place + 1), request="r", unforecast=""),
        forecast=Forecast(made=1.0, event=event) if band else None,
        record=None,
        problem="",
        config={"settings": {"seed": 1}, "data": {"digest": digest, "tokenizer": "t"}},
        settled=steps,
        knots=knots(steps, tokens, 0.0),
    )


def test_what_is_told_of_a_campaign(tmp_path: Path):
    """Text whose noise all sizes share hides a tenth of a nat, unless a size is compared with the others."""
    rng = random.Random(8)
    text = [rng.gauss(0, 0.3) for _ in range(1500)]

    def steps(size: int, more: float = 0.0) -> list[Settled]:
        own = settled(size, size, noise=0.001, more=lambda share: more * (share > 0.6))
        return [replace(each, loss=each.loss + noise) for each, noise in zip(own, text, strict=True)]

    known = [steps(size) for size in SIZES[:4]]
    band = expect(list(map(curve, SIZES, known)), NEXT, TOKENS, SHARES).curve
    names = zip(("first", "second", "third", "fourth"), ("one", "other", "one", "one"), known, strict=True)
    sizes = [member(name, place, digest, each) for place, (name, digest, each) in enumerate(names)]

    def told(fifth: Sequence[Settled], others: Sequence[SizeRecord]) -> dict[str, dict[str, str]]:
        last = member("fifth", 4, "one", fifth, band)
        campaign = CampaignRecord(name="c", folder=tmp_path, state=CampaignState(), sizes=[*others, last])
        return dict(findings(campaign))

    healthy, shifted = steps(NEXT), steps(NEXT, 0.1)
    found = told(shifted, sizes)
    assert list(found) == ["settings-2", "above-5"]
    assert "data digest is one in first and other here" in found["settings-2"]["why"]
    assert list(told(healthy, sizes)) == ["settings-2"]
    assert departure(shifted, TOKENS, band) is None, "alone, it is lost in the noise"
    elsewhere = [replace(each, size=replace(each.size, tokens=2 * TOKENS)) for each in sizes]
    assert list(told(shifted, elsewhere)) == ["settings-2"], "sizes with other plans are elsewhere in their schedules"
