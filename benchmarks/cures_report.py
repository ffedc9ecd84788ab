"""The arithmetic of `benchmarks.cures`: from two lineages to a case, and from cases to totals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.cures_draws import Draw
from benchmarks.cures_site import Ran
from opt_ops.core.failures.causes import Cause
from opt_ops.core.failures.classes import Domain, FailureClass, row

NEAR = 0.02  # nats from the twin: cured
LAST = 50  # updates of which the mean is taken
NO_REMEDY = (Cause.NONE, Cause.PLANNED_CHANGE)  # nothing is to be done about these

_OF_LOSS = (FailureClass.UNPLANNED_LR, FailureClass.UNDECLARED_CHANGE, FailureClass.SILENT_DATA_CORRUPTION)


def case(draw: Draw, ran: Ran, twin: Ran) -> dict[str, Any]:
    """What became of a draw, by the keys of the schema."""
    about_loss = [i for i in ran.incidents if row(i["kind"]).domain is Domain.LOSS or i["kind"] in _OF_LOSS]
    acted = [i for i in about_loss if i["acted"]]
    loss, tokens = end(ran)
    twin_loss, twin_tokens = end(twin, tokens)
    cured = ran.status == "COMPLETED" and abs(loss - twin_loss) <= NEAR
    wanted = 0 if draw.injected in NO_REMEDY else 1
    return {
        "id": draw.id,
        "injected": str(draw.injected),
        "named": _named(draw, about_loss),
        "remedies": [_remedy(i) for i in acted],
        "cured_by_first": cured and len(acted) == wanted,
        "cured": cured,
        "loss": round(loss, 4),
        "twin_loss": round(twin_loss, 4),
        "tokens": tokens,
        "twin_tokens": twin_tokens,
        "twin_actions": sum(i["acted"] for i in twin.incidents),
        "steps": max(ran.losses),
        "repeated_steps": ran.lines - len(ran.losses),
        "probe_steps": 0,
        "status": ran.status,
        "incidents": ran.incidents,
    }


def end(ran: Ran, tokens: int | None = None) -> tuple[float, int]:
    """The mean loss of the last updates of the settled history, and the tokens up to there.

    With `tokens`: where it had trained on as many.
    """
    steps = sorted(step for step, (_, seen) in ran.losses.items() if tokens is None or seen <= tokens)
    last = steps[-LAST:]
    return fmean(ran.losses[step][0] for step in last), ran.losses[last[-1]][1]


def totals(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums over all cases."""
    updates = sum(each["steps"] + each["repeated_steps"] + each["probe_steps"] for each in cases)
    return {
        "cases": len(cases),
        "named": sum(each["named"] == each["injected"] for each in cases),
        "cured_by_first": sum(each["cured_by_first"] for each in cases),
        "cured": sum(each["cured"] for each in cases),
        "median_gap": round(median(abs(each["loss"] - each["twin_loss"]) for each in cases), 4) if cases else None,
        "repeated_share": round(sum(each["repeated_steps"] for each in cases) / updates, 4) if updates else 0.0,
        "probe_share": round(sum(each["probe_steps"] for each in cases) / updates, 4) if updates else 0.0,
    }


def _named(draw: Draw, incidents: Sequence[Mapping[str, Any]]) -> str | None:
    """The first cause of the first incident. Without an incident: that nothing is wrong, by plan or as it healed."""
    if not incidents:
        return str(Cause.PLANNED_CHANGE if draw.options else Cause.NONE)
    first = incidents[0]
    if first["causes"]:
        return first["causes"][0]
    return first["kind"] if first["kind"] in set(Cause) else None


def _remedy(incident: Mapping[str, Any]) -> str:
    if incident["remedy"]:
        return str(incident["remedy"])
    more = ["lr"] * (incident["lr_factor"] is not None) + ["skip"] * bool(incident["skip_batches"])
    return "+".join([incident["action"], *more, *incident["settings"]])
