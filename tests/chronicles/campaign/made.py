"""Made curves of sizes: a known law, with noise on every step."""

from __future__ import annotations

import random
from collections.abc import Callable

from chronicles.campaign.law import SizeCurve
from chronicles.campaign.sizes import Settled, knots
from opt_ops.core.campaign.values import Law

LAW = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
SIZES = (125_000_000, 350_000_000, 1_300_000_000, 2_700_000_000, 6_700_000_000)
TOKENS = 180_000_000_000


def settled(
    parameters: int, seed: int, noise: float = 0.01, steps: int = 1500, more: Callable[[float], float] = lambda _: 0.0
) -> list[Settled]:
    """The steps of a size; `more` is added to the loss at a share of the plan."""
    rng = random.Random(seed)
    each = TOKENS // steps
    return [
        Settled(
            step=step,
            tokens=step * each,
            loss=LAW.loss(parameters, step * each) * (1 + noise * rng.gauss(0, 1)) + more(step / steps),
        )
        for step in range(1, steps + 1)
    ]


def curve(parameters: int, steps: list[Settled]) -> SizeCurve:
    """Its settled losses as the law is fitted to them."""
    found = knots(steps, TOKENS, 0.0)
    return SizeCurve(
        recipe=str(parameters),
        parameters=parameters,
        shares=[each.share for each in found],
        tokens=[each.tokens for each in found],
        losses=[each.loss for each in found],
    )
