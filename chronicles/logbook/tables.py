"""The tables of a logbook's front page, as rows of plain text and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chronicles.ledger.lemon_nodes import EXCLUDED, LemonNode
from chronicles.ledger.summary import LostToKind
from chronicles.ledger.wall_clock import Stage, TimePhase
from chronicles.logbook.drawing.curves import letter
from chronicles.report.model import (
    AllocationReport,
    CorpusReport,
    IncidentReport,
    LineageReport,
    RunReport,
    VerdictReport,
)
from chronicles.wording import count, duration, hours, names, short, when, whole
from chronicles.wording import nodes as nodes_named
from opt_ops.core.failures.classes import title
from opt_ops.core.values import Verdict

_PHASES = {
    TimePhase.KEPT: "Training, kept",
    TimePhase.LOST: "Training, discarded",
    TimePhase.RECOVERING: "Recovering",
    TimePhase.PAUSED: "Paused",
    TimePhase.HALTED: "Halted",
    TimePhase.QUEUED: "Waiting for nodes",
    TimePhase.STARTING: "Starting",
    TimePhase.OTHER: "Other",
}

_STAGES = {
    Stage.SEEING: "detection",
    Stage.DECIDING: "decision",
    Stage.ASKING: "waiting for an answer",
    Stage.ENDING: "ending processes",
    Stage.QUEUEING: "waiting for nodes",
    Stage.LOADING: "start and load",
    Stage.REPEATING: "repeated steps",
    Stage.WAITING: "other waits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A run with the lines of its family tree."""

    run: RunReport
    indent: str
    cause: str  # for people


def tree(runs: Sequence[RunReport], incidents: Sequence[IncidentReport] = ()) -> list[Branch]:
    """The runs; each is indented one level more than its parent. `incidents`: those of the lineage."""
    causes = {row.incident: row.cause_in_words for row in incidents}
    depth: dict[str, int] = {}
    for run in runs:
        depth[run.run] = depth[run.parent] + 1 if run.parent in depth else 0
    deepest = 6  # after many rollbacks the table must still fit on the page
    return [
        Branch(
            run=run,
            indent="  " * (min(depth[run.run], deepest) - 1) + "└ " if depth[run.run] else "",
            cause=causes.get(run.incident or "", run.cause),
        )
        for run in runs
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRow:
    """The losses of one corpus."""

    letter: str
    corpus: str
    loss: str
    step: str
    previous: str
    lowest: str
    evaluations: str


def validation(report: LineageReport) -> list[ValidationRow]:
    """The losses on validation data, lettered as on the curves where there is more than one corpus."""
    lettered = len(report.validation) > 1
    return [_validation(corpus, letter(place) if lettered else "") for place, corpus in enumerate(report.validation)]


def _validation(corpus: CorpusReport, letter: str) -> ValidationRow:
    after = f" after {whole(corpus.lowest_step)}" if corpus.lowest_step is not None else ""
    return ValidationRow(
        letter=letter,
        corpus=short(corpus.corpus, 60),
        loss=_loss(corpus.loss),
        step=whole(corpus.step),
        previous=_loss(corpus.previous),
        lowest=_loss(corpus.lowest) + after,
        evaluations=whole(corpus.evaluations),
    )


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LemonRow:
    """A node that failed."""

    node: str
    tag: str
    failures: str
    expected: str
    what: str
    parts: str
    hours: str
    now: str
    last: str


def lemons(report: LineageReport) -> list[LemonRow]:
    """The nodes that failed most for the time they were used."""
    return [_lemon(node) for node in report.lemon_nodes]


def _lemon(node: LemonNode) -> LemonRow:
    used = f"in {duration(node.seconds_used)}" if node.seconds_used else "unused"
    return LemonRow(
        node=short(node.node, 60),
        tag="LEMON" if node.lemon else "",
        failures=f"{whole(node.failures)}, {used}",
        expected=f"{node.expected:.2g}",
        what=names([_times(title(name), number) for name, number in node.kinds.items()]),
        parts=names([_times(name, number) for name, number in node.parts.items()] or ["–"]),
        hours=hours(node.node_hours_lost),
        now="excluded" if node.now == EXCLUDED else node.now,
        last=node.last,
    )


def _times(name: str, number: int) -> str:
    return f"{name} × {number}" if number > 1 else name


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRow:
    """What a phase or a stage took of the wall clock."""

    name: str
    label: str
    seconds: float
    share: float


def phases(report: LineageReport) -> list[TimeRow]:
    """The wall clock by phase; phases that took no time are skipped."""
    spent = report.ledger
    return [
        TimeRow(name=str(phase), label=label, seconds=seconds, share=seconds / spent.wall_seconds)
        for phase, label in _PHASES.items()
        if spent.wall_seconds and (seconds := spent.seconds_by_phase[phase]) > 0
    ]


def stages(report: LineageReport) -> list[TimeRow]:
    """The lost time by stage of recovery; stages that took no time are skipped."""
    spent = report.ledger
    return [
        TimeRow(name=str(stage), label=_STAGES[stage], seconds=seconds, share=seconds / spent.wall_seconds)
        for stage in Stage
        if spent.wall_seconds and (seconds := spent.seconds_by_stage[stage]) > 0
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRow:
    """What a failure class or a phase has cost."""

    label: str
    incident: str | None  # where it is one
    number: int | None
    drills: int
    repeated: float | None
    down: float
    share: float

    @property
    def both(self) -> float:
        """Seconds of both kinds."""
        return (self.repeated or 0.0) + self.down


def lost(report: LineageReport) -> list[LostRow]:
    """The lost time by failure class or phase, the largest first."""
    spent = report.ledger
    names = {incident.kind: incident.incident for incident in report.incidents}
    found = [_lost(each, names.get(each.kind), spent.wall_seconds) for each in spent.lost_by_kind]
    slower = spent.seconds_slower_than_healthy
    if slower is not None and slower > 0:
        share = _share(slower, spent.wall_seconds)
        found.append(
            LostRow(label=_SLOWER, incident=None, number=None, drills=0, repeated=None, down=slower, share=share)
        )
    return sorted((row for row in found if row.both > 0), key=lambda row: -row.both)


def _lost(each: LostToKind, incident: str | None, wall: float) -> LostRow:
    repeated = each.seconds_by_stage[Stage.REPEATING]
    return LostRow(
        label=cause(each.kind),
        incident=incident if each.incidents == 1 else None,
        number=each.incidents or None,
        drills=each.drills,
        repeated=repeated or None,
        down=each.seconds - repeated,
        share=_share(each.seconds, wall),
    )


def _share(seconds: float, wall: float) -> float:
    return seconds / wall if wall else 0.0


_SLOWER = "Steps slower than a healthy step, saves included"


def cause(name: str) -> str:
    """The title of a failure class or a phase."""
    return _PHASES[TimePhase(name)] if name in set(TimePhase) else title(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationRow:
    """An allocation."""

    allocation: str
    job: str
    nodes: str
    requested: str
    until: str
    why: str


def allocations(report: LineageReport) -> tuple[list[AllocationRow], int]:
    """The newest allocations, if there is more than one; and how many earlier ones are not listed."""
    found = report.allocations if len(report.allocations) > 1 else ()
    return [_allocation(each) for each in found[-_LISTED:]], max(0, len(found) - _LISTED)


def _allocation(each: AllocationReport) -> AllocationRow:
    return AllocationRow(
        allocation=each.allocation,
        job=short(each.job or "–", 40),
        nodes=f"{whole(len(each.nodes))} of {whole(each.wanted)}",
        requested=when(each.submitted),
        until=when(each.ended) if each.ended else each.status,
        why=each.why or "–",
    )


_LISTED = 16  # nodes, or allocations: of more than these, healthy nodes are skipped and similar nodes share a row
_ALIKE = 4


def nodes(found: Sequence[VerdictReport]) -> list[VerdictReport]:
    """All nodes if they are few; else those that are not healthy, and those excluded for the same reason as one row."""
    if len(found) <= _LISTED:
        return list(found)
    alike: dict[tuple[Any, ...], list[VerdictReport]] = {}
    for node in found:
        if not _is_healthy(node):
            key = (node.verdict, node.reason, node.source, node.drain, node.drill, bool(node.excluded_by))
            alike.setdefault(key, []).append(node)
    return [node for group in alike.values() for node in _together(group)]


def _together(group: Sequence[VerdictReport]) -> Iterator[VerdictReport]:
    if len(group) < _ALIKE:
        yield from group
        return
    by = {node.excluded_by for node in group if node.excluded_by}
    excluded = None if not by else next(iter(by)) if len(by) == 1 else f"{len(by)} incidents"
    yield replace(group[0], node=count(len(group), "node"), excluded_by=excluded)


def healthy_nodes(found: Sequence[VerdictReport]) -> str:
    """Which nodes are not in the table because they are healthy."""
    healthy = [node.node for node in found if _is_healthy(node)]
    return f"{nodes_named(healthy)} healthy" if len(found) > _LISTED and healthy else ""


def _is_healthy(node: VerdictReport) -> bool:
    return node.verdict == Verdict.HEALTHY and not node.excluded_by and not node.drain
