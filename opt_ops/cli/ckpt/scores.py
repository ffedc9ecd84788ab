"""What `opt-ops ckpt scores` prints: what was measured on the checkpoints of a lineage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chronicles.evaluations import scores, series
from chronicles.record import load
from chronicles.report import encode
from chronicles.wording import score
from opt_ops.cli.shared.options import Lineage
from opt_ops.cli.shared.output import Column, Format, say, show

_COLUMNS = [
    Column("STEP", "step", right=True),
    Column("RUN", "run"),
    Column("TASK", "task"),
    Column("METRIC", "metric"),
    Column("SCORE", "score", right=True),
    Column("BEFORE", "before", right=True),
    Column("WORSE", "fell"),
    Column("SETTLED", "settled"),
    Column("N", "n", right=True),
    Column("LIMIT", "limit", right=True),
    Column("SHOTS", "shots", right=True),
    Column("HARNESS", "harness", wide=True),
    Column("VERSION", "task_version", wide=True),
]


def show_scores(lineage: Lineage, output: Format, *, every: bool, header: bool) -> None:
    """Print the newest score of each thing that was measured, or every score."""
    rows = _rows(lineage, every=every)
    told = output not in (Format.JSON, Format.JSONL)
    show("opt-ops/ckpt-scores/1", [_in_words(row) for row in rows] if told else rows, _COLUMNS, output, header=header)
    if told and not rows:
        name = lineage.path.name
        say(f"No score is in the journal of {name}.\n  next: opt-ops ckpt evaluate {name}/STEP --tasks piqa")


def _rows(lineage: Lineage, *, every: bool) -> list[dict[str, Any]]:
    found = series(scores(load(lineage.path, telemetry=False)))
    rows: list[dict[str, Any]] = []
    for each in found:
        chosen = [*each.settled, *each.taken_back] if every else [each.newest]
        for one in chosen:
            before = next((x for x in reversed(each.settled) if x.step < one.step), None) if one.settled else None
            rows.append(
                {
                    **encode.encode(one),
                    "previous": None if before is None else {"step": before.step, "value": before.value},
                }
            )
    return rows


def _in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    before = row["previous"]
    return {
        **row,
        "score": score(row["value"], row["stderr"]),
        "before": None if before is None else f"{score(before['value'])} at {before['step']:,}",
    }
