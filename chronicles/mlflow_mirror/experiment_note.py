"""The front page of an MLflow experiment: a table of its lineages, and the newest lineage's own front page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chronicles.logbook.drawing.markup import plain, table
from opt_ops.core.state.status import ENDED

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a description."""

SIGNED = "*Written by opt-ops mlflow sync. Without this line, it is yours and stays as it is.*"
"""Marks a note that `sync` may replace. A note that was written before must still be known: never change it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MirroredLineage:
    """A lineage as its run in MLflow describes it; empty where the run has no such tag."""

    run_id: str
    lineage: str
    recipe: str
    author: str
    status: str
    step: str
    goodput: str
    incidents: str
    note: str  # its own front page, Markdown


def experiment_note(lineages: Sequence[MirroredLineage], link: Callable[[str], str], limit: int) -> str:
    """The note in at most `limit` characters, if it fits at all; the oldest rows are dropped first.

    Args:
        lineages: The newest first.
        link: The address at which MLflow shows a run, from the run's id.
        limit: MLflow's limit.
    """
    newest = lineages[0]
    name = plain(newest.lineage)
    rows = [[f"[{plain(each.lineage)}]({link(each.run_id)})", *map(plain, _cells(each))] for each in lineages]
    heads = ["Lineage", "Recipe", "By", "Status", ">Step", ">Goodput", ">Incidents"]
    first = f"Lineage {name}: {', '.join(_summary(newest))}."  # MLflow shows this line alone until the note is opened
    while True:
        parts = [first, "", *table(heads, rows), "", f"## Lineage {name}", "", newest.note, "", SIGNED]
        text = "\n".join(parts)
        if len(text) <= limit or not rows:
            return text
        rows = rows[:-1]


def _summary(newest: MirroredLineage) -> list[str]:
    known = (
        ("", newest.status),
        ("step ", newest.step),
        ("goodput ", newest.goodput),
        ("incidents ", newest.incidents),
    )
    return [f"{label}{plain(text)}" for label, text in known if text]


def _cells(each: MirroredLineage) -> list[str]:
    known = (each.recipe, each.author, each.status, each.step, each.goodput, each.incidents)
    return [text or "–" for text in known]


def _status(tags: Mapping[str, str]) -> str:
    """The status, with the time up to which it is known, unless it is an end."""
    status, as_of = tags.get("opt.status", ""), tags.get("opt.as_of", "")
    return f"{status}, as of {as_of}" if as_of and status not in ENDED else status


def mirrored(run_id: str, tags: Mapping[str, str]) -> MirroredLineage:
    """A lineage as the tags of its run in MLflow tell it."""
    return MirroredLineage(
        run_id=run_id,
        lineage=tags["opt.lineage"],
        recipe=tags.get("opt.recipe", ""),
        author=tags.get("mlflow.user", ""),
        status=_status(tags),
        step=tags.get("opt.step", ""),
        goodput=tags.get("opt.goodput", ""),
        incidents=tags.get("opt.incidents", ""),
        note=tags.get(NOTE, ""),
    )
