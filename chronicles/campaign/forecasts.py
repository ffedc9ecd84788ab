"""Forecasts of sizes that have not begun, out of those that have: what `campaign forecast` shows and journals."""

from __future__ import annotations

from typing import Any

from chronicles.campaign.law import LEAST_SIZES, Expected, SizeCurve, expect
from chronicles.campaign.sizes import LEAST_KNOTS, SHARES, CampaignRecord, SizeRecord
from opt_ops.core.codec import plain


def curves(campaign: CampaignRecord) -> list[SizeCurve]:
    """The settled curves of the sizes that have begun and come far enough."""
    return [
        SizeCurve(
            recipe=each.size.recipe,
            parameters=each.size.parameters,
            shares=[knot.share for knot in each.knots],
            tokens=[knot.tokens for knot in each.knots],
            losses=[knot.loss for knot in each.knots],
        )
        for each in campaign.sizes
        if len(each.knots) >= LEAST_KNOTS
    ]


def forecast(campaign: CampaignRecord, size: SizeRecord) -> dict[str, Any] | None:
    """The arguments of a request `forecast` for a size; None: there are too few losses."""
    known = [each for each in curves(campaign) if each.recipe != size.size.recipe]
    if len(known) < LEAST_SIZES:
        return None
    first = max(min(each.shares) for each in known)
    shares = [share for share in SHARES if share >= first]
    found = expect(known, size.size.parameters, size.size.tokens, shares)
    return _arguments(size, known, found)


def _arguments(size: SizeRecord, known: list[SizeCurve], found: Expected) -> dict[str, Any]:
    end = found.curve[-1]
    return {
        "recipe": size.size.recipe,
        "tokens": size.size.tokens,
        "loss": end.loss,
        "low": end.low,
        "high": end.high,
        "points": found.points,
        "sizes": [each.recipe for each in known],
        "fit": plain(found.law),
        "fit_low": plain(found.low),
        "fit_high": plain(found.high),
        "curve": plain(found.curve),
    }
