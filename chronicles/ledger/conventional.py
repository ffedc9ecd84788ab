"""The carbon figure as papers give it: GPU-hours × power of the data sheet × PUE × factor of the grid.

It stands beside the measured one because others are compared by it. Patterson et al., arXiv 2104.10350, and OPT
(arXiv 2205.01068, 75 t) count so, for the finished run alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from chronicles.ledger.by_cause import emissions
from opt_ops.config import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Conventional:
    """The figure with everything that it was computed from."""

    gpu_hours: float
    tdp_watts: float
    pue: float
    kwh: float
    kg_co2e_per_kwh: float | None
    factor_source: str | None
    factor_year: int | None
    tco2e: float | None


def conventional(gpu_hours: float | None, rates: Rates) -> Conventional | None:
    """The figure for so many GPU-hours; None if the site has not set the power of its GPUs."""
    if gpu_hours is None or rates.gpu_tdp_watts is None:
        return None
    kwh = gpu_hours * rates.gpu_tdp_watts / 1000 * rates.pue
    return Conventional(
        gpu_hours=gpu_hours,
        tdp_watts=rates.gpu_tdp_watts,
        pue=rates.pue,
        kwh=kwh,
        kg_co2e_per_kwh=rates.kg_co2e_per_kwh,
        factor_source=rates.factor_source,
        factor_year=rates.factor_year,
        tco2e=emissions(kwh, rates),
    )
