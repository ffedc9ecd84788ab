"""What MLflow's list of runs says of a lineage and its runs: names, outcomes and descriptions. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from chronicles.logbook.drawing.markup import plain
from chronicles.logbook.story.words import noun
from chronicles.report.model import IncidentReport, LineageReport, RunReport
from chronicles.wording import count, whole
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.status import Status

_NAME_LIMIT = 250  # characters; MLflow takes 255 of a run's name
_SHORT = {"clip_norm": "clip", "peak_lr": "peak lr"}  # settings as people call them


class Links(Protocol):
    """The addresses of MLflow's pages; empty where a page is not known."""

    def run(self, name: str) -> str:
        """A run's page."""
        ...

    def incident(self, run: str, incident: str) -> str:
        """The entry of an incident in the logbook that is kept at a run."""
        ...


def lineage_name(report: LineageReport) -> str:
    """`12 · opt-175b`; of a fork `13 · opt-175b · from 12.01 at 60,000`."""
    parts = [report.lineage, report.recipe or ""]
    if report.parent is not None:
        parts.append(f"from {report.parent.run} at {whole(report.parent.step)}")
    return _name(parts)


def run_name(report: LineageReport, run: RunReport) -> str:
    """`1.00 · start`, `1.01 · × 0.75 after 1-i003`, `1.02 · clip 0.5, asked by ann`."""
    if run.parent is None and run.incident is None:
        begun = f"from {report.parent.run} at {whole(report.parent.step)}" if report.parent else "start"
        return _name([run.run, begun])
    changed = ", ".join(_changes(report, run)) or f"back to {whole(run.from_step)}"
    author = _author(_incident(report, run.incident))
    if author:
        return _name([run.run, f"{changed}, asked by {author}"])
    return _name([run.run, f"{changed} after {run.incident}" if run.incident else changed])


def _name(parts: list[str]) -> str:
    return " · ".join(" ".join(part.split()) for part in parts if part)[:_NAME_LIMIT]


def _changes(report: LineageReport, run: RunReport) -> Iterator[str]:
    """What is different from the run before it."""
    before = next((each for each in report.runs if each.run == run.parent), None)
    was = before.lr_scale if before else 1.0
    if run.lr_scale != was and was:
        yield f"× {run.lr_scale / was:.3g}"
    for setting in run.settings:
        if before is None or setting not in before.settings:
            key, _, value = setting.partition("=")
            last = key.rpartition(".")[2]
            yield f"{_SHORT.get(last, last)} {value}"
    if before and run.data_changes != before.data_changes:
        new = [what for step, what in run.data_changes if (step, what) not in before.data_changes]
        yield f"data: {new[-1] if new else 'as before'}"
    skipped = [skip for skip in run.skips if before is None or skip not in before.skips]
    if skipped:
        number = sum(last - first + 1 for first, last in skipped)
        yield f"{whole(number)} {'batch' if number == 1 else 'batches'} skipped"


def _incident(report: LineageReport, incident: str | None) -> IncidentReport | None:
    return next((row for row in report.incidents if row.incident == incident), None)


def _author(row: IncidentReport | None) -> str:
    """Who asked for it; empty where nobody did."""
    return row.cause.partition(": ")[0] if row is not None and row.kind == FailureClass.OPERATOR else ""


def following(report: LineageReport, run: RunReport) -> RunReport | None:
    """The run for which this one was left."""
    return next((each for each in report.runs if each.parent == run.run), None)


def outcome(report: LineageReport) -> str:
    """How a lineage ended; empty while it has not."""
    words = {Status.COMPLETED: "completed", Status.HALTED: "halted", Status.CANCELLED: "cancelled"}
    known = words.get(report.status)
    return f"{known} at {whole(report.step)}" if known else ""


def run_outcome(report: LineageReport, run: RunReport, *, newest: bool) -> str:
    """How a run ended: as its lineage, or left for another run."""
    if newest:
        return outcome(report)
    after = following(report, run)
    return f"left for {after.run}" if after else "left"


def last_incident(rows: list[IncidentReport]) -> str:
    """`1-i003 loss spike`; empty where there was none."""
    if not rows:
        return ""
    drill = ", a drill" if rows[-1].drill else ""
    return f"{rows[-1].incident} {noun(rows[-1].kind)}{drill}"


def rows_of(report: LineageReport, run: RunReport) -> list[IncidentReport]:
    """The incidents of a run's attempts."""
    return [row for row in report.incidents if row.attempt in run.attempts]


def description(report: LineageReport, run: RunReport, links: Links, *, newest: bool) -> str:
    """A run's description in Markdown: where it began and why, and where and for what it was left."""
    said: list[str] = []
    if run.parent is not None:
        said.append(f"Began at {whole(run.from_step)} of {_to(run.parent, links)}{_because(report, run, run, links)}.")
    after = None if newest else following(report, run)
    if after is not None:
        last = run.last_step
        at = f" at {whole(last)}" if last is not None else ""
        why = _because(report, after, run, links)
        said.append(f"Left{at} for {_to(after.run, links)}, back to {whole(after.from_step)}{why}.")
        if last is not None and last > after.from_step:
            said.append(f"{count(last - after.from_step, 'step')} taken back.")
    elif (ended := outcome(report)) and newest:
        said.append(f"{ended.capitalize()}.")
    said.append(f"[The logbook of lineage {plain(report.lineage)}]({links.incident(run.run, '')})")
    return " ".join(said)


def _because(report: LineageReport, caused: RunReport, shown_at: RunReport, links: Links) -> str:
    row = _incident(report, caused.incident)
    if row is None:
        return ""
    what = f"request of {plain(_author(row))}" if _author(row) else noun(row.kind)
    drill = " (a drill)" if row.drill else ""
    return f", because of [{row.incident}]({links.incident(shown_at.run, row.incident)}): {what}{drill}"


def _to(run: str, links: Links) -> str:
    return f"[{run}]({links.run(run)})"


class ExperimentLinks:
    """Links within MLflow's pages: they hold on every address that a server is reached by."""

    def __init__(self, experiment: str, ids: Mapping[str, str]) -> None:
        self._experiment, self._ids = experiment, ids

    def run(self, name: str) -> str:
        """As `Links.run`."""
        return f"#/experiments/{self._experiment}/runs/{self._ids[name]}"

    def incident(self, run: str, incident: str) -> str:
        """As `Links.incident`."""
        place = f"#{incident}" if incident else ""
        return f"{self.run(run)}/artifacts/chronicle/logbook.html{place}"
