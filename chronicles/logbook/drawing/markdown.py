"""`logbook.md`: the logbook as text that reads well raw, on a Git host and in MLflow.

All untrusted text (notes, causes, node names, log lines) goes through `plain`, `code` or `quote`. None of it can become
markup, HTML, a new line or table cell, or a link other than a bare web address to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from chronicles.logbook.drawing import markdown_evaluations, markdown_log
from chronicles.logbook.drawing.markup import code, plain, table
from chronicles.logbook.front_page import FrontPage
from chronicles.logbook.story.model import Fold, Story
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, duration, percent, whole
from opt_ops.core.failures.classes import title


def logbook(report: LineageReport, front: FrontPage, story: Story) -> str:
    """The whole file."""
    parts = [
        _name(report),
        _head(report, front),
        _story(story),
        _numbers(front),
        _validation(front),
        markdown_evaluations.evaluations(front.evaluations),
        _time(report, front),
        _runs(report, front),
        _tried(story),
        _questions(front),
        markdown_log.log(report, story),
        _incidents(report, _without_routine(front, story)),
        _lemons(front),
        _nodes(front),
        _allocations(front),
        _foot(report, front),
    ]
    return "\n".join(line for part in parts for line in part)


def note(report: LineageReport, front: FrontPage, story: Story, limit: int) -> str:
    """The story and the incidents, in at most `limit` characters: the oldest incidents are dropped first."""
    rows = list(front.incidents)
    while True:
        shown = replace(front, incidents=rows)
        above = [*_story(story), *_head(report, front), *_numbers(front)]
        text = "\n".join([*above, *_incidents(report, shown), _FULL])
        if len(text) <= limit or not rows:
            return text[:limit]
        rows = rows[1:]


_MANY = 40  # incidents: of more, those that are routine are only in the tables of the log
_LEMONS = (
    "*Failures* of the last 28 days that count against the node. *Expected* is how many other nodes had in the same "
    "time of use. `opt-ops node ledger` covers all lineages."
)
_FULL = "The whole logbook, with curves, is the artifact `chronicle/logbook.html`."


def _name(report: LineageReport) -> Iterator[str]:
    yield f"# Lineage {plain(report.lineage)}: logbook"
    yield ""
    yield "The curves are in `logbook.html` and the numbers in `report.json`, beside this file."
    yield ""


def _head(report: LineageReport, front: FrontPage) -> Iterator[str]:
    yield f"**{front.status}.** {plain(front.lead)}"
    yield ""
    if report.recipe:
        yield f"Recipe {code(' '.join((report.recipe, *report.settings)))}."
        yield ""


def _story(story: Story) -> Iterator[str]:
    if not story.summary:
        return
    yield "## Story"
    yield ""
    for paragraph in story.summary:
        now = "Now. " if paragraph.now else ""
        yield f"**{plain(f'{now}{paragraph.title}')}** {plain(paragraph.text)}"
        yield ""


def _numbers(front: FrontPage) -> Iterator[str]:
    yield "## Numbers"
    yield ""
    yield from table([item.label for item in front.figures], [[item.value for item in front.figures]])
    yield ""


def _tried(story: Story) -> Iterator[str]:
    if not story.strategies:
        return
    yield "## What was tried"
    yield ""
    rows = [
        [plain(title(row.failure)), plain(row.strategy), whole(row.tried), plain(row.text)] for row in story.strategies
    ]
    yield from table(["Problem", "What was done", ">Times", "Outcome"], rows)
    yield ""


def _without_routine(front: FrontPage, story: Story) -> FrontPage:
    """Of many incidents, the table has those that are large; the others are in the tables of the log."""
    told = (entry for entry in story.entries if entry.large and entry.rule is not Fold.CAPACITY)
    large = {anchor for entry in told for anchor in entry.members}
    rows = [row for row in front.incidents if row.incident in large]
    left = len(front.incidents) - len(rows)
    if len(front.incidents) <= _MANY or not left:
        return front
    more = f"{count(left, 'incident')} less large {'is' if left == 1 else 'are'} in the tables of the log."
    return replace(front, incidents=rows, harmless=f"{more} {front.harmless}".rstrip())


def _incidents(report: LineageReport, front: FrontPage) -> Iterator[str]:
    if not report.incidents:
        return
    yield "## Incidents"
    yield ""
    rows = [
        [
            " ".join((plain(row.incident), *_tags(row))),
            _runs_of(row),
            plain(row.cause_in_words),
            ("would " if row.advisory else "")
            + plain(row.action or "–")
            + (f" × {row.lr_factor:g}" if row.lr_factor else ""),
            whole(row.steps_discarded),
            duration(row.seconds_down),
            "open" if row.closed is None else {None: "–", True: "yes", False: "**NO**"}[row.proven],
        ]
        for row in front.incidents
    ]
    rows.append(["Total", "", "", "", whole(front.totals.steps_discarded), duration(front.totals.seconds_down), ""])
    yield from table(["Incident", "Run", "Cause", "Action", ">Steps discarded", ">Downtime", "Proven"], rows)
    yield ""
    if front.harmless:
        yield front.harmless
        yield ""


def _tags(row: IncidentReport) -> Iterator[str]:
    if row.drill:
        yield f"**DRILL** {plain(row.drill)}"
    if row.planned:
        yield "**PLANNED**"
    if row.requested:
        yield "**REQUESTED**"
    if row.corrected:
        yield "**CORRECTED**"
    if row.advisory:
        yield "**ADVISORY**"


def _runs_of(row: IncidentReport) -> str:
    before, after = row.run_before, row.run_after
    return plain(f"{before} → {after}" if after and after != before else before or "–")


def _runs(report: LineageReport, front: FrontPage) -> Iterator[str]:
    if not report.runs:
        return
    yield "## Runs"
    yield ""
    rows = [
        [
            f"{branch.indent.replace(' ', '&nbsp;')}{plain(branch.run.run)}",
            plain(branch.run.parent or "–"),
            whole(branch.run.from_step),
            whole(branch.run.last_step),
            whole(branch.run.steps_kept),
            f"× {branch.run.lr_scale:.3g}",
            plain(branch.cause),
        ]
        for branch in front.tree
    ]
    yield from table(["Run", "Parent", ">From step", ">To step", ">Steps kept", ">Learning rate", "Cause"], rows)
    yield ""


def _time(report: LineageReport, front: FrontPage) -> Iterator[str]:
    if not report.ledger.wall_seconds:
        return
    yield "## Where the time went"
    yield ""
    yield front.goodput
    yield ""
    if front.reliability:
        yield front.reliability
        yield ""
    rows = [[phase.label, duration(phase.seconds), percent(phase.share)] for phase in front.phases]
    yield from table(["Phase", ">Time", ">Share"], rows)
    yield ""
    if not front.lost:
        return
    rows = [
        [
            plain(item.label),
            whole(item.number),
            duration(item.repeated),
            duration(item.down),
            duration(item.both),
            percent(item.share),
        ]
        for item in front.lost
    ]
    heads = ["Time lost to", ">Incidents", ">Repeated steps", ">Downtime", ">Total", ">Share of wall clock"]
    yield from table(heads, rows)
    yield ""
    stages = ", ".join(f"{stage.label} {duration(stage.seconds)}" for stage in front.stages)
    yield f"Lost time by stage: {stages}."
    yield ""


def _questions(front: FrontPage) -> Iterator[str]:
    if not front.questions:
        return
    yield "## Open questions"
    yield ""
    for question in front.questions:
        yield f"- {plain(question)}"
    yield ""


def _validation(front: FrontPage) -> Iterator[str]:
    if not front.validation:
        return
    yield "## Validation loss"
    yield ""
    rows = [
        [plain(f"{row.letter} {row.corpus}".strip()), row.loss, row.step, row.previous, row.lowest, row.evaluations]
        for row in front.validation
    ]
    yield from table(["Corpus", ">Newest", ">After step", ">Previous", ">Lowest", ">Evaluations"], rows)
    yield ""


def _lemons(front: FrontPage) -> Iterator[str]:
    if not front.lemons:
        return
    yield "## Nodes that failed most"
    yield ""
    rows = [
        [
            plain(row.node) + (f" **{row.tag}**" if row.tag else ""),
            *map(plain, (row.failures, row.expected, row.what, row.parts, row.hours, row.now, row.last)),
        ]
        for row in front.lemons
    ]
    heads = ["Node", "Failures", ">Expected", "Classes", "GPUs", ">Node-hours lost", "State", "Newest incident"]
    yield from table(heads, rows)
    yield ""
    yield _LEMONS
    yield ""


def _nodes(front: FrontPage) -> Iterator[str]:
    if not front.nodes and not front.healthy_nodes:
        return
    yield "## Nodes"
    yield ""
    rows = [
        [
            plain(text or "–")
            for text in (node.node, node.verdict, node.reason, node.source, node.excluded_by, node.drain)
        ]
        for node in front.nodes
    ]
    if rows:
        yield from table(["Node", "Verdict", "Reason", "Source", "Excluded by", "Drain"], rows)
        yield ""
    if front.healthy_nodes:
        yield f"{front.healthy_nodes}."
        yield ""


def _allocations(front: FrontPage) -> Iterator[str]:
    if not front.allocations:
        return
    yield "## Allocations"
    yield ""
    rows = [
        [plain(cell) for cell in (row.allocation, row.job, row.nodes, row.requested, row.until, row.why)]
        for row in front.allocations
    ]
    yield from table(["Allocation", "Job", ">Nodes", "Requested", "Until", "Why"], rows)
    yield ""
    if front.allocations_before:
        yield front.allocations_before
        yield ""


def _foot(report: LineageReport, front: FrontPage) -> Iterator[str]:
    remarks = "".join(f" {plain(remark)}." for remark in report.journal.remarks)
    as_of = f", as of {front.as_of}" if report.as_of is not None else ""
    yield "---"
    yield ""
    drawn = f"Drawn from the journal up to entry {whole(report.journal.seq)} and the telemetry{as_of}."
    yield f"{drawn} Times are UTC.{remarks}"
    yield ""
