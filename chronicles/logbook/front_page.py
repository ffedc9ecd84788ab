"""The front page of a logbook: what a reader wants to know first, as plain text and rows, for every form of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chronicles.logbook import tables
from chronicles.logbook.open_questions import questions
from chronicles.operators import MOVES, halt_cause
from chronicles.wording import count, day, duration, hours, minute, percent, when, whole
from opt_ops.core.state.status import Status
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, Driver, Severity

_TONES = {Status.COMPLETED: "ok", Status.HALTED: "bad", Status.CANCELLED: "warn", Status.RECOVERING: "warn"}
_TONES |= {Status.ROLLING_BACK: "warn"}

Row = Mapping[str, Any]

_MANY = 30  # incidents: of more, the front page lists those that touched training


def front(report: Row, loss: float | None) -> dict[str, Any]:
    """Everything above the log. `loss` is the newest settled one."""
    incidents = report["incidents"]
    allocations, before = tables.allocations(report)
    return {
        "tone": _TONES.get(Status(report["status"]), ""),
        "lead": lead(report),
        "share": round(100 * min(1.0, report["step"] / report["total_steps"]), 2) if report["total_steps"] else 0,
        "figures": figures(report, loss),
        "incidents": [row for row in incidents if not _harmless(row)] if len(incidents) > _MANY else incidents,
        "harmless": _harmless_ones(incidents),
        **totals(incidents),
        "tree": tables.tree(report["runs"]),
        "goodput": _goodput(report),
        "reliability": reliability(report),
        "phases": tables.phases(report),
        "lost": tables.lost(report),
        "stages": tables.stages(report),
        "validation": tables.validation(report),
        "worst": tables.worst(report),
        "questions": questions(report),
        "nodes": tables.nodes(report["nodes"]),
        "well": tables.well(report["nodes"]),
        "allocations": allocations,
        "allocations_before": f"And {whole(before)} before these." if before else "",
        "as_of": when(report["as_of"]),
    }


def _harmless(row: Row) -> bool:
    """A node without ranks that was taken out, and nothing more came of it."""
    return row["action"] == Action.EXCLUDE and row["proven"] is True and row["drill"] is None and not row["advice"]


def _harmless_ones(incidents: Sequence[Row]) -> str:
    number = sum(map(_harmless, incidents)) if len(incidents) > _MANY else 0
    which = f"{count(number, 'node')} on which no rank ran {'was' if number == 1 else 'were'} taken out"
    return f"Besides, {which}; nothing was lost. The log tells of each." if number else ""


def totals(incidents: Sequence[Row]) -> dict[str, Any]:
    """What several incidents lost together, before one attempt that answers them all, counts once."""
    lost: dict[str, tuple[int, float]] = {}
    for row in incidents:
        before = lost.get(row["next_attempt"] or row["incident"], (0, 0.0))
        now = (max(before[0], row["steps_lost"] or 0), max(before[1], row["seconds_down"] or 0.0))
        lost[row["next_attempt"] or row["incident"]] = now
    return {
        "steps_lost": sum(steps for steps, _ in lost.values()),
        "seconds_down": sum(seconds for _, seconds in lost.values()),
    }


def lead(report: Row) -> str:
    """Two or three sentences: where it stands, what happened, whether anyone was needed."""
    return " ".join(filter(None, (_standing(report), _size(report), _happened(report), _human(report))))


def _size(report: Row) -> str:
    shape, size = report["shape"], report["size"]
    if report["ended"] or shape is None or size == shape["nodes"]:
        return ""
    return f"On {whole(size)} of {count(shape['nodes'], 'node')}, for want of more."


def _standing(report: Row) -> str:
    total, step = report["total_steps"], report["step"]
    of = f"{whole(step)} of {count(total, 'step')}" if total else count(step, "step")
    wall = duration(report["goodput"]["wall_seconds"])
    match report["status"]:
        case Status.NEW:
            return "The request waits for a daemon."
        case Status.COMPLETED:
            return f"All {count(total or step, 'step')} were trained in {wall}."
        case Status.HALTED:
            return f"Training stopped after {of}. {halt_cause(report, report['halts'][-1])}"
        case Status.CANCELLED:
            return f"Stopped after {of}, as asked by {report['why'].rstrip(' .')}."
        case Status.PAUSED if not report["paused"]:
            return f"Resumed and waiting for nodes, {of} trained."
        case Status.PAUSED:
            return f"Paused by {report['why'].rstrip(' .')}. {of} trained."
        case Status.PLANNED | Status.QUEUED:
            return f"Waiting for nodes, {of} trained."
        case Status.PREFLIGHT | Status.STARTING:
            return f"Starting, {of} trained."
        case Status.RECOVERING | Status.ROLLING_BACK:
            doing = str(report["status"]).lower().replace("_", " ")
            return f"{doing.capitalize()}, {of} trained."
        case _:
            return f"Training, {of} trained in {wall}.{_eta(report)}"


def _eta(report: Row) -> str:
    left = seconds_left(report)
    if left is None:
        return ""
    return f" At this goodput the rest takes {duration(left)}, until {minute(from_iso(report['as_of']) + left)}."


def seconds_left(report: Row) -> float | None:
    """Until the last step, if the rest goes as well as all so far."""
    spent, total = report["goodput"], report["total_steps"]
    if not spent["goodput"] or not total:
        return None
    return (total - report["step"]) * spent["healthy_step_seconds"] / spent["goodput"]


def _happened(report: Row) -> str:
    rows = [row for row in report["incidents"] if _failure(row)]
    rest = _by_plan(report["incidents"])
    if not rows:
        return f"No incident so far{rest}." if report["runs"] else ""
    drills = sum(row["drill"] is not None for row in rows)
    of = {0: "", len(rows): ", all of them drills" if len(rows) > 1 else ", a drill"}.get(
        drills, f", {drills} of them drills"
    )
    again = report["goodput"]["steps_repeated"]
    number = f"{count(len(rows), 'incident')}{of}{interrupted(rows)}"
    return f"{number}, {_cured(rows)}{rest}; {count(again, 'step')} taken back."


def interrupted(rows: Sequence[Row]) -> str:
    """Of many incidents, how many training stood still for."""
    stopped = sum(row["action"] in MOVES and not row["advice"] for row in rows)
    return f", {whole(stopped)} of which interrupted training" if stopped < len(rows) > _MANY else ""


def _failure(row: Row) -> bool:
    """Whether something went wrong: no move that was planned, and nothing that a person asked for."""
    return not row["planned"] and row["kind"] != "operator"


def _by_plan(rows: Sequence[Row]) -> str:
    planned = sum(row["planned"] for row in rows)
    asked = sum(row["kind"] == "operator" for row in rows)
    parts = ((planned, count(planned, "planned move")), (asked, f"{count(asked, 'change')} asked for"))
    return "".join(f"; {what}" for number, what in parts if number)


def _cured(rows: Sequence[Row]) -> str:
    still_open = sum(row["closed"] is None for row in rows)
    failed = sum(row["proven"] is False for row in rows)
    advice = sum(row["advice"] for row in rows)
    halted = sum(row["closed"] is not None and row["proven"] is None and not row["advice"] for row in rows)
    if not still_open and not failed and not advice and not halted:
        return "proven" if len(rows) == 1 else "all proven"
    parts = (
        (sum(row["proven"] is True for row in rows), "proven"),
        (still_open, "still open"),
        (failed, "NOT PROVEN"),
        (halted, "answered by a person"),
        (advice, "only advised on"),
    )
    return ", ".join(f"{number} {what}" if len(rows) > 1 else what for number, what in parts if number)


def _human(report: Row) -> str:
    if report["status"] == Status.HALTED:
        return "A human is needed."
    if not report["ended"] and report["driver"] == Driver.PERSON:
        return "A person drives: opt-ops watches and advises."
    if not report["ended"] and report["driver"] == Driver.SHADOW:
        return "Shadow mode: another launcher runs the training, opt-ops only watches."
    calls = max(len(report["halts"]), sum(row["severity"] == Severity.PAGE for row in report["alerts"]))
    if calls:
        return f"A human was needed {times(calls)}."
    by_hand = any(row["verb"] not in ("start", "stop") and not row["refused"] for row in report["operators"])
    if report["status"] != Status.COMPLETED or not report["incidents"]:
        return ""
    return "People steered, none was called." if by_hand else "No human was needed."


def times(number: int) -> str:
    """`once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(number) or count(number, "time")


def figures(report: Row, loss: float | None) -> list[dict[str, str]]:
    """The few numbers worth a large type."""
    spent, total = report["goodput"], report["total_steps"]
    rows = [row for row in report["incidents"] if _failure(row)]
    drills = sum(row["drill"] is not None for row in rows)
    found = [("Steps", whole(report["step"]), f"of {whole(total)}" if total else "")]
    if loss is not None:
        found.append(("Loss", f"{loss:.3f}", "nats per token, newest"))
    if len(report["validation"]) == 1 and (row := report["validation"][0])["loss"] is not None:
        found.append(("Validation loss", f"{row['loss']:.3f}", f"after step {whole(row['step'])}"))
    if spent["goodput"] is not None:
        found.append(("Goodput", percent(spent["goodput"]), f"{spent['healthy_step_seconds']:.3g} s a healthy step"))
    left = None if report["ended"] else seconds_left(report)
    if left is not None:
        found.append(("Expected end", day(from_iso(report["as_of"]) + left), f"in {duration(left)}, at this goodput"))
    found.append(("Incidents", whole(len(rows)), f"{count(drills, 'drill')}" if drills else ""))
    found.append(("Taken back", whole(spent["steps_repeated"]), "steps"))
    found.append(("Wall clock", duration(spent["wall_seconds"]), f"since {when(report['started'])}"))
    return [{"label": label, "value": value, "more": more} for label, value, more in found]


def _goodput(report: Row) -> str:
    spent = report["goodput"]
    if spent["goodput"] is None:
        return "No step counts yet, so there is no goodput."
    return (
        f"Goodput is {percent(spent['goodput'])}: {count(spent['kept_steps'], 'kept step')} × "
        f"{spent['healthy_step_seconds']:.3g} s, the healthy step, "
        f"÷ {duration(spent['wall_seconds'])} of wall clock. {percent(spent['share_of_ideal'])} of what steps of "
        f"{spent['ideal_step_seconds']:.3g} s without a break would have taken."
    )


def reliability(report: Row) -> str:
    """Failures, recoveries, restarts, nodes and energy, in sentences."""
    spent = report["goodput"]
    told: list[str] = []
    if spent["failures"]:
        between = f"{count(spent['failures'], 'failure')}, one per {duration(spent['mtbf_seconds'])} of training"
        told.append(f"{between}; training again after {duration(spent['mttr_seconds'])} on average")
    if spent["restarts"]:
        ways = ((spent[f"restarts_{way}"], way) for way in ("automatic", "manual", "planned"))
        told.append(f"{count(spent['restarts'], 'restart')}: {', '.join(f'{n} {way}' for n, way in ways if n)}")
    if spent["longest_hands_off_seconds"] and spent["calls"]:
        told.append(f"{duration(spent['longest_hands_off_seconds'])} at most without a call")
    if spent["node_hours"]:
        told.append(f"{hours(spent['node_hours'])} node-hours, {hours(spent['node_hours_lost'])} of them lost")
    if spent["kwh"] is not None:
        co2 = f", {spent['tco2e']:.3g} tCO2e" if spent["tco2e"] is not None else ""
        told.append(f"{hours(spent['kwh'])} kWh{co2}")
    if spent["cost"] is not None:
        told.append(f"{spent['currency']} {spent['cost']:,.0f}")
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in told)
