"""Open questions of a lineage: what the next person on call must know or decide first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from chronicles.ledger.lemon_nodes import NOT_HELD
from chronicles.logbook.entries.operators import halt_cause
from chronicles.logbook.story.model import Afterthought, Later
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, duration, full, short, uncapitalized, when
from opt_ops.core.failures.classes import title
from opt_ops.core.state.status import Status
from opt_ops.core.values import Verdict

_SHOWN = 10  # questions of one sort
_OFTEN = 3  # incidents of one class without a known cause: so many are worth an investigation


def questions(report: LineageReport, thoughts: Sequence[Afterthought] = ()) -> list[str]:
    """Sentences of plain text, the most urgent first. `thoughts`: the afterthoughts of the lineage."""
    return [
        *_halted(report),
        *_capped(_open_incidents(report)),
        *_capped(_unproven(report)),
        *_unexplained(report),
        *_capped(_lemons(report)),
        *_capped(_nodes(report)),
        *_capped(_never_retested(thoughts)),
        *_capped(_undelivered_alerts(report)),
        *_capped(_open_questions(report)),
    ]


def for_operators(report: LineageReport) -> list[str]:
    """Those of the questions that only a person can answer, for a handover."""
    return [
        *_halted(report),
        *_capped(_unproven(report)),
        *_capped(_undelivered_alerts(report)),
        *_capped(_open_questions(report)),
    ]


def to_watch(report: LineageReport) -> list[str]:
    """The other questions, for a handover."""
    return [
        *_capped(_open_incidents(report)),
        *_unexplained(report),
        *_capped(_lemons(report)),
        *_capped(_nodes(report)),
    ]


def drill_mark(drill: str | None) -> str:
    """Begins a sentence about something that a drill caused: `DRILL d003: `."""
    return f"DRILL {drill}: " if drill else ""


def _capped(found: Iterator[str]) -> list[str]:
    sentences = list(found)
    left = [f"{count(len(sentences) - _SHOWN, 'more line')} of this sort."] if len(sentences) > _SHOWN else []
    return [*sentences[-_SHOWN:], *left]


def _halted(report: LineageReport) -> Iterator[str]:
    if report.status == Status.HALTED and report.halts:
        halted = next((row for row in report.incidents if row.incident == report.halts[-1].incident), None)
        mark = drill_mark(halted.drill if halted else None)
        yield f"{mark}Training is halted. {halt_cause(report, report.halts[-1])} What must change before it continues?"


def _open_incidents(report: LineageReport) -> Iterator[str]:
    for row in report.incidents:
        if row.closed is None:
            action = row.action.replace("_", " ") if row.action else ""
            decision = f"The decision is {action}, not proven yet" if action else "Nothing is decided yet"
            cause = full(short(row.cause), keep=row.nodes)
            yield f"{drill_mark(row.drill)}{row.incident} has been open since {when(row.opened)}: {cause} {decision}."


def _unproven(report: LineageReport) -> Iterator[str]:
    for row in report.incidents:
        if row.proven is False:
            why = full(short(str(row.proof.get("mismatch") or row.cause)))
            yield f"{drill_mark(row.drill)}{row.incident} is NOT PROVEN: {why}"


def _unexplained(report: LineageReport) -> Iterator[str]:
    corrected = {note.target for note in report.notes}
    low = [row for row in report.incidents if _unknown(row) and row.incident not in corrected]
    for name, number in Counter(row.kind for row in low).most_common():
        if number >= _OFTEN:
            newest = [row.incident for row in low if row.kind == name][-1]
            what = f"{number} incidents of class {uncapitalized(title(name))}"
            yield f"{what} have no known cause. The newest is {newest}."


def _unknown(row: IncidentReport) -> bool:
    """Whether its cause is not known. That of a drill is."""
    return row.confidence == "low" and row.drill is None


def _lemons(report: LineageReport) -> Iterator[str]:
    for node in report.lemon_nodes:
        if node.lemon and node.now != NOT_HELD:
            often = f"failed {count(node.failures, 'time')} in {duration(node.seconds_used)} of use"
            yield f"{short(node.node, 40)} {often}, more often than chance explains. Should it be replaced?"


def _nodes(report: LineageReport) -> Iterator[str]:
    for node in report.nodes:
        name = short(node.node, 40)
        if node.excluded_by and node.verdict == Verdict.HEALTHY:
            yield f"{name} is healthy, but {node.excluded_by} excluded it. May attempts start there again?"
        elif node.excluded_by and node.drain == "refused":
            yield f"{name} is excluded, but the scheduler refused to drain it: other jobs may still get it."


def _never_retested(thoughts: Sequence[Afterthought]) -> Iterator[str]:
    for each in thoughts:
        if each.kind is Later.NEVER_RETESTED:
            yield each.text + (f" {each.next}" if each.next else "")


def _undelivered_alerts(report: LineageReport) -> Iterator[str]:
    for alert in report.alerts:
        if alert.delivered is False:
            why = full(short(alert.why or "the reason is not known"))
            what = full(short(alert.title, 80), keep=("opt-ops",))
            yield f"An alert was not delivered: {what} {why}"


def _open_questions(report: LineageReport) -> Iterator[str]:
    """Notes that end with a question, until a later note has the same target."""
    newest = {note.target: note for note in report.notes}
    for note in newest.values():
        if note.text.rstrip().endswith("?"):
            yield f"{short(note.author, 40)} asks about {note.target}: {short(note.text)}"
