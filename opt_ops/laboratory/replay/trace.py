"""Reads a record of incidents (CSV) for a replay. What the record does not say stays unknown until it is sampled."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opt_ops.laboratory.replay.scenario import ScenarioError, TraceRules

COLUMNS = frozenset({"date", "run", "kind", "step_start", "step_end", "cause", "row_is"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedIncident:
    """A row of the record that is replayed."""

    label: str  # date and run, as in the record
    what: Literal["stop", "divergence"]
    step: int | None
    cause: str


@dataclass(slots=True)
class IncidentTrace:
    """The rows of a record."""

    rows: int = 0
    incidents: list[TracedIncident] = field(default_factory=list[TracedIncident])
    left_out: Counter[str] = field(default_factory=Counter[str])
    """Rows that are not replayed, by kind and reason."""


def read(path: Path, rules: TraceRules) -> IncidentTrace:
    """Read a record that has the columns `COLUMNS`. Empty fields are unknown.

    Raises:
        ScenarioError: the file cannot be read, or lacks a column.
    """
    record = IncidentTrace()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = COLUMNS - set(rows.fieldnames or ())
            if missing:
                names = ", ".join(sorted(missing))
                raise ScenarioError(f"{path} has no column {names}", "docs/replay.md lists the columns")
            for row in rows:
                _take(record, row, rules)
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}", "docs/replay.md describes the CSV file") from error
    return record


def _take(record: IncidentTrace, row: dict[str, str], rules: TraceRules) -> None:
    record.rows += 1
    kind, run = row["kind"] or "unknown", row["run"] or ""
    what = rules.kinds.get(kind)
    if not run.startswith(rules.runs) and not (run == "" and what):
        record.left_out[f"{kind}: another lineage"] += 1
    elif what is None:
        record.left_out[f"{kind}: {rules.why_not.get(kind, 'no interruption')}"] += 1
    else:
        first, last = _number(row["step_start"]), _number(row["step_end"])
        step = last if row["row_is"] == "run end" else first
        label = " ".join(part for part in (row["date"], run) if part)
        record.incidents.append(TracedIncident(label=label, what=what, step=step, cause=row["cause"] or "unknown"))


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
