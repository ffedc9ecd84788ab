"""`opt-ops ledger --total`: the sums over all lineages, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opt_ops.cli.shared.output import Column, Format, show
from opt_ops.core.failures.classes import title
from opt_ops.core.text import age
from opt_ops.errors import UsageError

_ENDS = [
    Column("LINEAGES THAT ARE", "end"),
    Column("N", "lineages", right=True),
    Column("NODE-HOURS", "node_hours", right=True),
    Column("GPU-HOURS", "gpu_hours", right=True),
    Column("KWH", "kwh", right=True),
    Column("TCO2E", "tco2e", right=True),
    Column("COST", "cost", right=True),
    Column("STEPS KEPT", "steps_kept", right=True),
    Column("TAKEN BACK", "steps_taken_back", right=True),
]
_CAUSES = [
    Column("CAUSE", "what"),
    Column("N", "incidents", right=True),
    Column("TIME", "time", right=True),
    Column("NODE-HOURS", "node_hours", right=True),
    Column("KWH", "kwh", right=True),
    Column("TCO2E", "tco2e", right=True),
    Column("COST", "cost", right=True),
    Column("NOT METERED", "unmetered", right=True, wide=True),
]
FACTS = [Column("WHAT", "what"), Column("IS", "value", right=True), Column("MEANING", "meaning", wide=True)]


def tables(item: Mapping[str, Any], output: Format, header: bool) -> None:
    """Print the item of `opt-ops/ledger-total/1` as three tables."""
    ends = [{"end": end, **_rounded(sums)} for end, sums in item["by_end"].items() if sums["lineages"]]
    show("", [*ends, {"end": "all", **_rounded(item["all"])}], _ENDS, output, header=header)
    causes = [
        _rounded(row)
        | {"what": title(row["cause"]), "time": age(row["seconds"]), "unmetered": age(row["unmetered_seconds"])}
        for row in item["by_cause"]
        if row["seconds"] or row["incidents"]
    ]
    if causes:
        sys.stdout.write("\n")
        show("", causes, _CAUSES, output, header=header)
    sys.stdout.write("\n")
    facts = [{"what": what, "value": value, "meaning": meaning} for what, value, meaning in _facts(item)]
    show("", facts, FACTS, output, header=header)


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """For people: whole numbers from 100 on, three places below."""
    return {key: _short(value) if isinstance(value, float) else value for key, value in row.items()}


def _short(value: float) -> float:
    return round(value) if abs(value) >= 100 else round(value, 3)


def _facts(item: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    yield "abandoned %", percent(item["share_abandoned"]), "node-hours of halted and cancelled lineages"
    yield "lost %", percent(item["share_lost"]), "node-hours outside kept steps, of completed lineages"
    yield "forks %", percent(item["share_forks"]), "node-hours of forks"
    yield "drills %", percent(item["share_drills"]), "node-hours that drills cost"
    people = item["people"]
    yield "calls", people["calls"], "pages to on-call"
    yield "waited for people", age(people["seconds_waited"]), "from a page to its answer"
    yield (
        "people's time",
        age(people["person_seconds"]),
        "estimate: from the first request after a page to the last one",
    )
    yield "requests", people["requests"], "of people, to steer"
    for author, number in (people["by_author"] or {}).items():
        yield f"  {author}", number, ""
    yield "metered", age(item["measured"]["metered_seconds"]), "time that the GPUs' energy counters cover"
    figure = item["conventional"]
    if figure is None:
        yield "conventional tCO2e", None, "set gpu_tdp_watts in [ledger]"
        return
    yield "conventional MWh", _short(figure["kwh"] / 1000), _power(figure)
    yield "conventional tCO2e", _rounded(figure)["tco2e"], factor(figure)
    if figure["completed_only"] is not None:
        yield "  completed only", _rounded(figure["completed_only"])["tco2e"], "as papers count"


_CONVENTIONAL = [
    Column("LINEAGE", "lineage"),
    Column("OF", "of"),
    Column("GPU-HOURS", "gpu_hours", right=True),
    Column("MWH", "mwh", right=True),
    Column("TCO2E", "tco2e", right=True),
]


def conventional(rows: Sequence[Mapping[str, Any]], output: Format, *, header: bool) -> None:
    """Print the carbon figure as papers give it, of kept updates alone and of everything that was held.

    Raises:
        UsageError: the site has not set the power of its GPUs.
    """
    known = [row for row in rows if row["conventional"] is not None]
    if rows and not known:
        raise UsageError(
            "the power of a GPU is not known",
            "set gpu_tdp_watts under [ledger] in opt-ops.toml, then opt-ops ledger --total",
        )
    found = [each for row in known for each in (_kept(row), _everything(row))]
    if output in (Format.TABLE, Format.WIDE):
        found = [_rounded(each) for each in found]
        show("", found, _CONVENTIONAL, output, header=header)
        if known:
            figure = known[0]["conventional"]
            sys.stdout.write(f"\n{_power(figure)}; {factor(figure)}\n")
    else:
        show("opt-ops/ledger-conventional/1", found, _CONVENTIONAL, output, header=header)


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    figure = row["conventional"]
    hours = row["conventional_kwh"] * 1000 / (figure["tdp_watts"] * figure["pue"])
    return _figure(row, "kept updates", hours, row["conventional_kwh"], row["conventional_tco2e"])


def _everything(row: Mapping[str, Any]) -> dict[str, Any]:
    figure = row["conventional"]
    return _figure(row, "everything held", figure["gpu_hours"], figure["kwh"], figure["tco2e"])


def _figure(row: Mapping[str, Any], of: str, hours: float, kwh: float, tco2e: float | None) -> dict[str, Any]:
    figure = row["conventional"]
    factors = {key: figure[key] for key in ("tdp_watts", "pue", "kg_co2e_per_kwh", "factor_source", "factor_year")}
    said = {"lineage": row["lineage"], "of": of, "gpu_hours": hours, "mwh": kwh / 1000, "kwh": kwh, "tco2e": tco2e}
    return said | factors


def _power(figure: Mapping[str, Any]) -> str:
    return f"GPU-hours × {figure['tdp_watts']:g} W × PUE {figure['pue']:g}"


def factor(figure: Mapping[str, Any]) -> str:
    """The factor of the grid with its source, or what is missing: a number without a source is not printed."""
    if missing := [key for key in ("kg_co2e_per_kwh", "factor_source") if figure[key] is None]:
        return f"no figure in tonnes: set {' and '.join(missing)} in [ledger]"
    year = f", {figure['factor_year']}" if figure["factor_year"] else ""
    return f"{figure['kg_co2e_per_kwh']:g} kg per kWh, {figure['factor_source']}{year}"


def percent(share: float | None) -> str | None:
    """A share in percent; None where it is not known."""
    return None if share is None else f"{100 * share:.2f}"
