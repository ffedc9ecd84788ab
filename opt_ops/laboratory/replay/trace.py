"""Reads a record of incidents (CSV) for a replay. What the record does not say stays unknown until it is sampled."""

from __future__ import annotations

import csv
import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opt_ops.errors import NotFound
from opt_ops.laboratory.replay.scenario import ScenarioError, TraceRules

COLUMNS = ("date", "run", "kind", "step_start", "step_end", "cause", "row_is")
_OTHER_NAMES = {
    "date": ("day", "time", "timestamp", "when", "started", "start_time", "datetime"),
    "run": ("run_id", "run_name", "job", "job_id", "name", "experiment", "lineage"),
    "kind": ("type", "category", "class", "event", "incident", "failure", "failure_type"),
    "step_start": ("step", "steps", "iteration", "iter", "first_step", "from_step", "start_step", "begin", "update"),
    "step_end": ("last_step", "to_step", "end_step", "end", "until"),
    "cause": ("reason", "description", "comment", "note", "notes", "message", "details", "what", "root_cause"),
    "row_is": ("row", "means", "row_kind", "row_type"),
}
"""What other records call these columns. It is used only to say which column was probably meant."""


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
        NotFound: the file cannot be read.
        ScenarioError: it is no CSV file, or lacks a column.
    """
    record = IncidentTrace()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            rows = csv.DictReader(file)
            _require_columns(path, rows.fieldnames or ())
            for row in rows:
                _take(record, row, rules)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", "name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError(f"{path} is no CSV file: {error}", f"give the columns {', '.join(COLUMNS)}") from error
    return record


def _require_columns(path: Path, found: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if not missing:
        return
    told = [f"`{name.strip()}`{_meaning(name, missing)}" for name in found if name not in COLUMNS]
    raise ScenarioError(
        f"{path} has no column {', '.join(missing)}. Other columns found: {', '.join(told) or 'none'}",
        f"name the columns {', '.join(COLUMNS)} in the first line",
    )


def _meaning(found: str, missing: Sequence[str]) -> str:
    """What a column of another record is called here, if that can be guessed."""
    plain = found.strip().lower().replace(" ", "_").replace("-", "_")
    known = [name for name in missing if plain == name or plain in _OTHER_NAMES[name]]
    near = known or difflib.get_close_matches(plain, missing, n=1)
    return f" (here: {near[0]})" if near else " (not used here)"


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
