"""The front page of a logbook: what a reader wants to know first, as plain text and rows, for every form of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from chronicles.curves import letter
from chronicles.ledger import Phase, Stage
from chronicles.people import halt_cause
from chronicles.questions import questions
from chronicles.words import count, day, duration, minute, names, nodes, percent, short, when, whole
from opt_ops.core.codec import from_iso
from opt_ops.core.run import Status
from opt_ops.core.values import Driver, Severity, Verdict

_TONES = {Status.COMPLETED: "ok", Status.HALTED: "bad", Status.CANCELLED: "warn", Status.RECOVERING: "warn"}
_TONES |= {Status.ROLLING_BACK: "warn"}

_PHASES = {
    Phase.KEPT: "training that counts",
    Phase.LOST: "training taken back",
    Phase.RECOVERING: "recovering",
    Phase.PAUSED: "paused",
    Phase.HALTED: "halted",
    Phase.QUEUED: "waiting for nodes",
    Phase.STARTING: "starting",
    Phase.OTHER: "other",
}

Row = Mapping[str, Any]


def front(report: Row, loss: float | None) -> dict[str, Any]:
    """Everything above the log. `loss` is the newest settled one."""
    incidents = report["incidents"]
    return {
        "tone": _TONES.get(Status(report["status"]), ""),
        "lead": lead(report),
        "share": round(100 * min(1.0, report["step"] / report["total_steps"]), 2) if report["total_steps"] else 0,
        "figures": figures(report, loss),
        "steps_lost": sum(row["steps_lost"] or 0 for row in incidents),
        "seconds_down": sum(row["seconds_down"] or 0.0 for row in incidents),
        "tree": tree(report["runs"]),
        "goodput": _goodput(report),
        "reliability": reliability(report),
        "phases": phases(report),
        "lost": lost(report),
        "stages": stages(report),
        "validation": validation(report),
        "worst": worst(report),
        "questions": questions(report),
        "nodes": [row for row in report["nodes"] if len(report["nodes"]) <= _LISTED or not _well(row)],
        "well": _many_well(report["nodes"]),
        "allocations": allocations(report),
        "as_of": when(report["as_of"]),
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
    return f"{count(len(rows), 'incident')}{of}, {_cured(rows)}{rest}; {count(again, 'step')} taken back."


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


def tree(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """The runs with the lines of their family tree; a run that goes on from its elder is drawn one level in."""
    depth: dict[str, int] = {}
    for row in runs:
        depth[row["run"]] = depth[row["parent"]] + 1 if row["parent"] in depth else 0
    deepest = 6  # a long line of rollbacks must not walk off the page
    return [
        {"row": row, "indent": "  " * (min(depth[row["run"]], deepest) - 1) + "└ " if depth[row["run"]] else ""}
        for row in runs
    ]


def validation(report: Row) -> list[dict[str, str]]:
    """The losses on validation data, lettered as on the curves where there is more than one corpus."""

    def told(loss: float | None, step: int | None = None) -> str:
        return "–" if loss is None else f"{loss:.3f}" + (f" after {whole(step)}" if step is not None else "")

    return [
        {
            "letter": letter(place) if len(report["validation"]) > 1 else "",
            "corpus": short(row["corpus"], 60),
            "step": whole(row["step"]),
            "loss": told(row["loss"]),
            "previous": told(row["previous"]),
            "lowest": told(row["lowest"], row["lowest_step"]),
            "evaluations": whole(row["evaluations"]),
        }
        for place, row in enumerate(report["validation"])
    ]


def worst(report: Row) -> list[dict[str, str]]:
    """The nodes that failed most for the time that they were used."""
    return [
        {
            "node": short(row["node"], 60),
            "tag": "LEMON" if row["lemon"] else "",
            "failures": f"{whole(row['failures'])} in {duration(row['seconds_used'])}",
            "expected": f"{row['expected']:.2g}",
            "what": names([f"{kind(name)} × {n}" if n > 1 else kind(name) for name, n in row["kinds"].items()]),
            "parts": names([f"{name} × {n}" if n > 1 else name for name, n in row["parts"].items()] or ["–"]),
            "hours": f"{row['node_hours_lost']:,.3g}",
            "now": row["now"],
            "last": row["last"],
        }
        for row in report["worst_nodes"]
    ]


def phases(report: Row) -> list[dict[str, Any]]:
    """The wall clock by phase, those that took any time."""
    spent = report["goodput"]
    return [
        {
            "name": str(phase),
            "label": label,
            "seconds": spent["seconds_by_phase"][phase],
            "share": spent["seconds_by_phase"][phase] / spent["wall_seconds"],
            "flex": f"{spent['seconds_by_phase'][phase] / spent['wall_seconds']:.4f}",
        }
        for phase, label in _PHASES.items()
        if spent["wall_seconds"] and spent["seconds_by_phase"][phase] > 0
    ]


def lost(report: Row) -> list[dict[str, Any]]:
    """What the lost time went to, by failure class or phase, largest first."""
    spent = report["goodput"]
    names = {row["kind"]: row["incident"] for row in report["incidents"]}
    found = [_lost_row(row, names.get(row["kind"])) for row in spent["lost_by_kind"]]
    slower = spent["seconds_slower_than_healthy"]
    if slower is not None and slower > 0:
        unnamed = {"incident": None, "number": None, "drills": 0, "repeated": None}
        found.append({"label": _SLOWER, "down": slower, **unnamed})
    for item in found:
        item["both"] = (item["repeated"] or 0.0) + item["down"]
        item["share"] = item["both"] / spent["wall_seconds"] if spent["wall_seconds"] else 0.0
    return sorted((item for item in found if item["both"] > 0), key=lambda item: -item["both"])


def _lost_row(row: Row, incident: str | None) -> dict[str, Any]:
    repeated = row["seconds_by_stage"][Stage.REPEATING]
    return {
        "incident": incident if row["incidents"] == 1 else None,
        "label": cause(row["kind"]),
        "number": row["incidents"] or None,
        "drills": row["drills"],
        "repeated": repeated or None,
        "down": row["seconds"] - repeated,
    }


_SLOWER = "steps slower than the healthy one, saves among them"


def cause(name: str) -> str:
    """A failure class or a phase for people."""
    return _PHASES[Phase(name)] if name in set(Phase) else kind(name)


def kind(name: str) -> str:
    """A failure class for people."""
    return _KINDS.get(name, name.replace("_", " "))


_KINDS = {
    "bad_gpu": "bad GPU",
    "time_limit": "time limit, a move",
    "nodes_returned": "more nodes, a move",
    "operator": "asked for",
}


def allocations(report: Row) -> list[dict[str, str]]:
    """The allocations, once there is more than the first."""
    rows = report["allocations"]
    return [
        {
            "allocation": str(row["allocation"]),
            "job": short(row["job"] or "–", 40),
            "nodes": f"{whole(len(row['nodes']))} of {whole(row['wanted'])}",
            "asked": when(row["submitted"]),
            "until": when(row["ended"]) if row["ended"] else str(row["status"]),
            "why": str(row["why"] or "–"),
        }
        for row in (rows if len(rows) > 1 else [])
    ]


_LISTED = 16  # nodes, all of which are listed; of more than these, those with something to tell


def _well(row: Row) -> bool:
    return row["verdict"] == Verdict.HEALTHY and not row["excluded_by"] and not row["drain"]


def _many_well(rows: Sequence[Row]) -> str:
    well = [row["node"] for row in rows if _well(row)]
    return f"{nodes(well)} healthy" if len(rows) > _LISTED and well else ""


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
        told.append(f"{spent['node_hours']:,.3g} node-hours, {spent['node_hours_lost']:,.3g} of them lost")
    if spent["kwh"] is not None:
        co2 = f", {spent['tco2e']:.3g} tCO2e" if spent["tco2e"] is not None else ""
        told.append(f"{spent['kwh']:,.3g} kWh{co2}")
    if spent["cost"] is not None:
        told.append(f"{spent['currency']} {spent['cost']:,.0f}")
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in told)


def stages(report: Row) -> list[dict[str, Any]]:
    """The lost time by stage, those that took any."""
    spent = report["goodput"]
    return [
        {"name": str(stage), "label": stage.value, "seconds": seconds, "share": seconds / spent["wall_seconds"]}
        for stage in Stage
        if spent["wall_seconds"] and (seconds := spent["seconds_by_stage"][stage]) > 0
    ]
