"""The tables of a logbook's front page, as rows of plain text and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chronicles.ledger.wall_clock import Phase, Stage
from chronicles.logbook.drawing.curves import letter
from chronicles.wording import count, duration, hours, names, short, when, whole
from chronicles.wording import nodes as nodes_named
from opt_ops.core.values import Verdict

Row = Mapping[str, Any]

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
            "failures": f"{whole(row['failures'])}, "
            + (f"in {duration(used)}" if (used := row["seconds_used"]) else "unused"),
            "expected": f"{row['expected']:.2g}",
            "what": names([f"{kind(name)} × {n}" if n > 1 else kind(name) for name, n in row["kinds"].items()]),
            "parts": names([f"{name} × {n}" if n > 1 else name for name, n in row["parts"].items()] or ["–"]),
            "hours": hours(row["node_hours_lost"]),
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


def stages(report: Row) -> list[dict[str, Any]]:
    """The lost time by stage, those that took any."""
    spent = report["goodput"]
    return [
        {"name": str(stage), "label": stage.value, "seconds": seconds, "share": seconds / spent["wall_seconds"]}
        for stage in Stage
        if spent["wall_seconds"] and (seconds := spent["seconds_by_stage"][stage]) > 0
    ]


def allocations(report: Row) -> tuple[list[dict[str, str]], int]:
    """The newest, once there is more than the first; and how many came before them."""
    rows = report["allocations"] if len(report["allocations"]) > 1 else []
    return [_allocation(row) for row in rows[-_LISTED:]], max(0, len(rows) - _LISTED)


def _allocation(row: Row) -> dict[str, str]:
    return {
        "allocation": str(row["allocation"]),
        "job": short(row["job"] or "–", 40),
        "nodes": f"{whole(len(row['nodes']))} of {whole(row['wanted'])}",
        "asked": when(row["submitted"]),
        "until": when(row["ended"]) if row["ended"] else str(row["status"]),
        "why": str(row["why"] or "–"),
    }


_LISTED = 16  # nodes, or allocations: of more than these, the well are left out, and what is alike is one row
_ALIKE = 4


def nodes(rows: Sequence[Row]) -> list[Row]:
    """All, where they are few; else those that are not well, and as one row those that were taken out for the same."""
    if len(rows) <= _LISTED:
        return list(rows)
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not _well(row):
            alike.setdefault(_sort(row), []).append(row)
    return [told for group in alike.values() for told in _together(group)]


def _sort(row: Row) -> tuple[Any, ...]:
    keys = ("verdict", "reason", "source", "drain", "drill")
    return (*(row[key] for key in keys), bool(row["excluded_by"]))


def _together(group: Sequence[Row]) -> Iterator[Row]:
    if len(group) < _ALIKE:
        yield from group
        return
    by = {row["excluded_by"] for row in group if row["excluded_by"]}
    excluded = None if not by else next(iter(by)) if len(by) == 1 else f"{len(by)} incidents"
    yield {**group[0], "node": count(len(group), "node"), "excluded_by": excluded}


def well(rows: Sequence[Row]) -> str:
    """How many are not in the table because nothing is wrong with them."""
    named = [row["node"] for row in rows if _well(row)]
    return f"{nodes_named(named)} healthy" if len(rows) > _LISTED and named else ""


def _well(row: Row) -> bool:
    return row["verdict"] == Verdict.HEALTHY and not row["excluded_by"] and not row["drain"]
