"""Afterthoughts on halts that a person answered: whether what halted the lineage came again."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.report.model import IncidentReport
from chronicles.wording import count, duration, full, short, uncapitalized
from opt_ops.core import events as e
from opt_ops.core.failures.classes import title

QUIET_STEPS = 1000  # after the answer: what has not come again by then went away


def after_halts(timeline: Timeline) -> Iterator[Afterthought]:
    """At most one afterthought for each halt that was answered by going on."""
    for halt in timeline.report.halts:
        row = timeline.rows.get(halt.incident or "")
        answer = timeline.answer_to(halt)
        if row is None or answer is None or isinstance(answer.event, e.StopRequested) or row.drill is not None:
            continue
        found = _judged(timeline, row, answer)
        if found is not None:
            yield found


def _judged(timeline: Timeline, row: IncidentReport, answer: e.Entry) -> Afterthought | None:
    attempt = timeline.first_attempt_after(answer.ts)
    known = timeline.record.state.attempts.get(attempt or "")
    if known is None:
        return None
    begun = known.checkpoint.step if known.checkpoint else 0
    again = next((each for each in timeline.failures_after(answer.ts) if is_alike(timeline, row, each)), None)
    if again is not None and timeline.step_of(again) <= begun + QUIET_STEPS:
        came = f"{_what(timeline, row)} came again {duration(again.opened - answer.ts)} after the answer"
        return Afterthought(
            anchor=row.incident,
            at=again.opened,
            kind=Later.RETURNED,
            verdict=Judged.FAILED,
            text=f"{full(came)} {_answer(answer)}",
            because=(again.incident, f"e{answer.seq}"),
            next=None,
        )
    at = timeline.reached(begun + QUIET_STEPS, attempt)
    if at is None or changes_settings(answer.event):
        return None
    steps = timeline.newest_step(attempt) - begun
    never = f"{_what(timeline, row)} has not come again"
    since = f"{never} in the {count(steps, 'step')} since"
    if again is not None:
        since = f"{never} within {count(timeline.step_of(again) - begun, 'step')}"
    return Afterthought(
        anchor=row.incident,
        at=Moment(at),
        kind=Later.NEVER_RETURNED,
        verdict=Judged.WENT_AWAY,
        text=f"{full(since)} {_answer(answer)}",
        because=(f"e{answer.seq}",),
        next=None,
    )


def is_alike(timeline: Timeline, row: IncidentReport, other: IncidentReport) -> bool:
    """Whether the other failure is the first one again: its class, and also before the first step, or not."""
    return other.kind == row.kind and timeline.before_first_step(other) is timeline.before_first_step(row)


def changes_settings(event: e.Event) -> bool:
    """Whether an answer goes on under other settings, not only on."""
    return isinstance(event, e.ChangeRequested)


def _what(timeline: Timeline, row: IncidentReport) -> str:
    before = " before its first step" if timeline.before_first_step(row) else ""
    return f"{uncapitalized(title(row.kind))}{before}"


def _answer(answer: e.Entry) -> str:
    """What the person wrote about it."""
    event = answer.event
    assert isinstance(event, (e.ResumeRequested, e.ChangeRequested))
    if not event.reason.strip():
        return "What was mended is not written down."
    return f"{short(event.author, 40)} wrote: “{short(event.reason, 200)}”."
