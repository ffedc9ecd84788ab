"""Draws a lineage's logbook and report from its journal and telemetry: the same bytes while nothing new happens."""

from __future__ import annotations

from pathlib import Path

from chronicles.kept_curve import kept_points
from chronicles.logbook.drawing import curve_data, figure, html, markdown, scores, sparkline
from chronicles.logbook.drawing.log_rows import StepAxis
from chronicles.logbook.drawing.marks import marks
from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import front_page
from chronicles.logbook.story.build import story
from chronicles.logbook.story.model import Story
from chronicles.record import LineageRecord, load
from chronicles.report import encode
from chronicles.report.build import build
from chronicles.report.model import LineageReport
from opt_ops.config import Rates
from opt_ops.runfolder.files import write_json, write_text

FOLDER = "chronicle"  # below the lineage's folder


def render(folder: Path, rates: Rates | None = None) -> list[Path]:
    """Write `logbook.md`, `logbook.html` and `report.json` into the lineage's chronicle folder; return their paths.

    Raises:
        JournalError: the journal cannot be trusted.
    """
    record = load(folder)
    return write(folder, record, build(record, rates))


def write(folder: Path, record: LineageRecord, report: LineageReport) -> list[Path]:
    """Write the files of a lineage that is already read into its chronicle folder; return their paths."""
    return write_files(folder / FOLDER, record, report)


def write_files(into: Path, record: LineageRecord, report: LineageReport) -> list[Path]:
    """Write the three files of a logbook into a folder; return their paths."""
    told = story(record, report, entries(record, report))
    front = front_page(report, newest_loss(record), told.afterthoughts)
    drawn = drawings(record, report, told)
    paths = [into / "logbook.md", into / "logbook.html", into / "report.json"]
    write_text(paths[0], markdown.logbook(report, front, told))
    write_text(paths[1], html.logbook(report, front, told, drawn))
    write_json(paths[2], {**encode.lineage(report), "story": encode.encode(told)})
    return paths


def drawings(record: LineageRecord, report: LineageReport, told: Story) -> html.Drawn:
    """Everything that the page shows of the curves."""
    shown = figure.measured(record, report)
    small = scores.draw(report)
    if not shown.curves:
        return html.Drawn(scores=small)
    placed = marks(report, told)
    kept = [(point.ts, point.step) for _, point in kept_points(record.curves)]
    figures = figure.draw(shown, placed)
    loss = shown.curves["loss"]
    return html.Drawn(
        figures=figures,
        data=curve_data.encode(record, report, shown, placed),
        keys=figure.keys(figures[0]),
        phases=[sparkline.draw(loss, each, placed) for each in told.summary],
        scores=small,
        axis=StepAxis(*zip(*kept, strict=True)) if kept else StepAxis(),
    )


def newest_loss(record: LineageRecord) -> float | None:
    """The loss of the last kept update; None if there is none, or it was not finite."""
    last = None
    for _, point in kept_points(record.curves):
        last = point.loss
    return last
