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


def by_cause(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Of each injected cause: cases, and how many of them were named and cured."""
    causes = dict.fromkeys(each["injected"] for each in cases)
    return {
        cause: {
            "cases": len(own),
            "named": sum(each["named"] == cause for each in own),
            "cured_by_first": sum(each["cured_by_first"] for each in own),
            "cured": sum(each["cured"] for each in own),
        }
        for cause in causes
        if (own := [each for each in cases if each["injected"] == cause])
    }


def spread(twins: Mapping[str, Ran]) -> dict[str, Any]:
    """How far undisturbed twins of different seeds end apart: what a gap must be compared with."""
    losses = sorted(round(end(twin)[0], 4) for twin in twins.values())
    return {"losses": losses, "spread": round(losses[-1] - losses[0], 4) if losses else None}


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    rows = [
        "| case | named | remedies | cured | loss | twin |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for each in report["cases"]:
        remedies = ", ".join(each.get("remedies", ())) or "none"
        cells = [each["id"], each.get("named"), remedies, "yes" if each.get("cured") else "no"]
        rows.append(f"| {' | '.join(map(str, cells))} | {each.get('loss')} | {each.get('twin_loss')} |")
    rows += ["", "| cause | cases | named | cured by the first | cured |", "| --- | ---: | ---: | ---: | ---: |"]
    for cause, counts in report.get("by_cause", {}).items():
        rows.append(f"| {cause} | {' | '.join(map(str, counts.values()))} |")
    rows.append("")
    rows += [f"{name}: {value}" for name, value in report.get("totals", {}).items()]
    return "\n".join([*rows, f"twins: {report.get('twins')}"])


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
