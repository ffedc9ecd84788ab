"""What the members of a chain or burst have in common. That they have nothing in common is a finding, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from chronicles.logbook.story.items import Item
from chronicles.logbook.story.words import capital, counted, listed
from chronicles.report.model import IncidentReport
from chronicles.wording import short, whole

_NAMED = 6  # nodes that are listed by name


def in_common(items: Sequence[Item]) -> str:
    """A sentence or two; empty for fewer than two failures."""
    rows = [item.row for item in items if item.row is not None and item.row.is_failure]
    often = Counter(row.kind for row in rows).most_common(1)
    rows = [row for row in rows if row.kind == often[0][0]]
    if len(rows) < 2:
        return ""
    what = "" if len(rows) == len(items) else f"The {counted(rows[0].kind, len(rows))}: "
    found = [f"{aspect} {value}".strip() for aspect, values in _aspects(rows) if (value := _one(values))]
    placed = [row for row in rows if row.nodes]
    no_node = len(placed) > 1 and not set.intersection(*(set(row.nodes) for row in placed))
    if not found:
        return capital(f"{what}no node, rank, step, frame or exit code in common.")
    shared = f"{what}in common {listed(found)}"
    return capital(f"{shared}, but no node." if no_node else f"{shared}.")


def nodes_of(items: Sequence[Item]) -> str:
    """The nodes of failures, in order: `n055, n077 and n116`; of many the first and the last."""
    named = list(dict.fromkeys(node for item in items if item.row is not None for node in item.row.nodes))
    return listed(named) if len(named) <= _NAMED else f"{named[0]} to {named[-1]}"


def rank_of(row: IncidentReport) -> str:
    """The rank of an incident, if it names one."""
    rank = row.evidence.get("rank")
    return f"rank {rank}" if isinstance(rank, int) else ""


def _aspects(rows: Sequence[IncidentReport]) -> Iterator[tuple[str, Sequence[str]]]:
    """What they may share, the most telling first."""
    yield "node", [",".join(row.nodes) for row in rows]
    yield "", [rank_of(row) for row in rows]
    yield "step", [whole(row.step_failed) if row.step_failed is not None else "" for row in rows]
    yield "innermost frame", [_frame(row) for row in rows]
    yield "exit code", [_text(row, "code") for row in rows]
    yield "signal", [_text(row, "signal") for row in rows]


def _one(values: Sequence[str]) -> str:
    """The value that all have; empty if they differ or one has none."""
    return short(values[0], 60) if values[0] and len(set(values)) == 1 else ""


def _frame(row: IncidentReport) -> str:
    odd = set(row.stacks.odd) if row.stacks else set()
    groups = row.stacks.groups if row.stacks else ()
    return next((group.frames[0] for group in groups if group.frames and not odd.isdisjoint(group.ranks)), "")


def _text(row: IncidentReport, key: str) -> str:
    value = row.evidence.get(key)
    return str(value) if isinstance(value, (int, str)) else ""
