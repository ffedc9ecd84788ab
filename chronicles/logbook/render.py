"""Draws a lineage's logbook and report from journal and telemetry: the same files for as long as nothing happens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.logbook.drawing import figure, html, markdown
from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import front
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from opt_ops.config import Rates
from opt_ops.runfolder.files import write_json, write_text

FOLDER = "chronicle"  # below the lineage's folder


def render(folder: Path, rates: Rates | None = None) -> list[Path]:
    """Write `chronicle/logbook.md`, `logbook.html` and `report.json` of the lineage in `folder`; return their paths.

    Raises:
        JournalError: the journal cannot be trusted.
    """
    record = load(folder)
    return write(folder, record, build(record, rates))


def write(folder: Path, record: LineageRecord, report: Mapping[str, Any]) -> list[Path]:
    """The same, of a lineage that was read already."""
    log, first = entries(record, report), front(report, newest_loss(record))
    first["gaps"] = any(not point.finite for part in record.curves for point in part.points)
    curves = figure.draw(record, report)
    into = folder / FOLDER
    paths = [into / "logbook.md", into / "logbook.html", into / "report.json"]
    write_text(paths[0], markdown.render(report, first, log))
    write_text(paths[1], html.render(report, first, log, curves))
    write_json(paths[2], report)
    return paths


def newest_loss(record: LineageRecord) -> float | None:
    """Of the last update that counts."""
    last = None
    for _, point in kept_points(record.curves):
        last = point.loss
    return last
