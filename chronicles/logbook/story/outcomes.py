"""What became of each thing that was tried: whether training passed the place, and whether the failure came again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from chronicles.logbook.story.after_alerts import acted_on
from chronicles.logbook.story.after_rollbacks import SETTLED_STEPS
from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.report.model import IncidentReport
from opt_ops.core import events as e
from opt_ops.core.decide.trouble import about_loss
from opt_ops.core.failures.classes import Domain, FailureClass
from opt_ops.core.failures.classes import row as row_of
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action

_OURS = frozenset(Action) - {Action.ADOPT, Action.COMPLETE}


class Outcome(StrEnum):
    """What is known of one try."""

    WORKED = "worked"
    FAILED = "failed"
    NOT_NEEDED = "not_needed"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One thing that was done about one failure."""

    failure: str
    strategy: str  # tries with the same words are one strategy
    outcome: Outcome
    anchor: str
    seconds_down: float | None = None
    steps_lost: int = 0
    distance: int | None = None  # of a rollback: steps from the checkpoint to the onset
    attempt: str | None = None  # that followed: failures that are answered together share it, and its lost steps
    queued: bool = False  # it waited for nodes: no spare was left
    called: bool = False  # it was a person's turn afterwards


_BY_VERDICT: Mapping[Judged, Outcome] = {
    Judged.WORKED: Outcome.WORKED,
    Judged.WENT_AWAY: Outcome.WORKED,
    Judged.FAILED: Outcome.FAILED,
    Judged.NOT_NEEDED: Outcome.NOT_NEEDED,
}


def tries(timeline: Timeline, thoughts: Mapping[tuple[str, Later], Afterthought]) -> Iterator[Try]:
    """Everything that was tried against real failures by playbooks, in order."""
    for row in timeline.report.incidents:
        if row.drill is not None or not row.is_failure or row.advisory or row.action not in _OURS:
            continue
        if row.action == Action.HALT:
            yield _halted(timeline, row)
            continue
        following = timeline.record.state.attempts.get(timeline.first_attempt_after(row.opened) or "")
        until = following.intended_at if following and row.next_attempt else row.closed or row.opened
        yield Try(
            failure=row.kind,
            strategy=strategy(row),
            outcome=_outcome(timeline, row, thoughts),
            anchor=row.incident,
            seconds_down=row.seconds_down,
            steps_lost=row.steps_discarded or 0,
            distance=_distance(row),
            attempt=row.next_attempt,
            queued=_queued(timeline, row.opened, until),
        )


def waits(timeline: Timeline, thoughts: Mapping[tuple[str, Later], Afterthought]) -> Iterator[Try]:
    """Jumps of the loss that nothing was done about: an alert waits for them to heal."""
    for entry, alert in timeline.alerts:
        if alert.signal == FailureClass.LOSS_SPIKE and not acted_on(timeline, alert):
            anchor = f"e{entry.seq}"
            healed = (anchor, Later.HEALED) in thoughts
            outcome = Outcome.WORKED if healed else Outcome.OPEN
            yield Try(failure=alert.signal, strategy=WAITED, outcome=outcome, anchor=anchor, seconds_down=0.0)


WAITED = "waited for it to heal"
_HALTED = "stopped, and called a person"
RESUMED = "a person looked, and resumed"


def strategy(row: IncidentReport) -> str:
    """What a playbook did, in words: the same for all incidents that were answered alike."""
    hardware = row_of(row.kind).domain is Domain.HARDWARE
    match row.action:
        case Action.REPLACE_RANKS:
            return "ranks replaced in place, on a spare node" if hardware else "ranks replaced in place"
        case Action.RESTART if row.kind == FailureClass.ALLOCATION_LOST:
            return "asked for nodes anew"
        case Action.RESTART if hardware and row.excluded:
            return "restarted on a spare node"
        case Action.RESTART:
            return "restarted on the same nodes"
        case Action.EXCLUDE:
            return "excluded while no rank ran there, a replacement asked for"
        case Action.ROLLBACK:
            return ", ".join(["rolled back", *_changes(row.lr_factor, row.settings, row.skip_batches)])
        case Action.RECONFIGURE:
            words = _changes(row.lr_factor, row.settings, row.skip_batches)
            return ", ".join(["restarted under other settings", *words])
        case Action.NOTIFY:
            return "called a person, training went on"
        case _:
            return _HALTED


def _changes(factor: float | None, settings: tuple[str, ...], skipped: int) -> list[str]:
    words = [f"learning rate × {factor:g}"] if factor is not None else []
    return [*words, *settings, *(["batches skipped"] if skipped else [])]


def _distance(row: IncidentReport) -> int | None:
    return row.onset - (row.checkpoint_step or 0) if row.action == Action.ROLLBACK and row.onset is not None else None


def _halted(timeline: Timeline, row: IncidentReport) -> Try:
    """A halt says that what its class is usually answered with has failed."""
    before = (
        each for each in reversed(timeline.report.incidents) if each.kind == row.kind and each.opened < row.opened
    )
    usual = next((strategy(each) for each in before if each.drill is None and each.action != Action.HALT), _HALTED)
    return Try(
        failure=row.kind,
        strategy=usual,
        outcome=Outcome.FAILED if usual != _HALTED or row.answered else Outcome.OPEN,
        anchor=row.incident,
        called=True,
    )


def _outcome(timeline: Timeline, row: IncidentReport, thoughts: Mapping[tuple[str, Later], Afterthought]) -> Outcome:
    for kind in (Later.CAME_BACK, Later.HEALED_AGAIN, Later.PASSED):
        if (thought := thoughts.get((row.incident, kind))) is not None:
            return _BY_VERDICT[thought.verdict]
    if row.action == Action.ROLLBACK:
        return Outcome.FAILED if row.proven is False else Outcome.OPEN
    if row.action == Action.EXCLUDE and (row.incident, Later.FIT_AFTER_ALL) in thoughts:
        return Outcome.NOT_NEEDED
    if row.closed is None:
        return Outcome.OPEN
    if row.proven is False:
        return Outcome.FAILED
    if _came_again(timeline, row):
        return Outcome.FAILED
    if row.action in (Action.EXCLUDE, Action.NOTIFY):
        return Outcome.WORKED
    return _passed(timeline, row)


def _came_again(timeline: Timeline, row: IncidentReport) -> bool:
    """Whether the class came again: where hardware failed, on the same node; else within 500 steps of the place."""
    alike = (each for each in timeline.failures_after(row.opened) if each.kind == row.kind)
    if row_of(row.kind).domain is Domain.HARDWARE:
        return any(set(each.nodes) & set(row.nodes) for each in alike)
    limit = timeline.step_of(row) + SETTLED_STEPS
    return any(timeline.step_of(each) <= limit for each in alike)


def _passed(timeline: Timeline, row: IncidentReport) -> Outcome:
    """Whether training passed the place before another failure of its own ended it. A bad node is no such failure."""
    state, place = timeline.record.state, timeline.step_of(row)
    name = timeline.first_attempt_after(row.opened) if row.next_attempt else row.attempt  # not the one that proved it
    for _ in state.attempts:
        attempt = state.attempts.get(name or "")
        if attempt is None:
            return Outcome.OPEN
        if (attempt.last_step or 0) > place:
            return Outcome.WORKED
        ended = next((each for each in timeline.failures_after(row.opened) if each.attempt == name), None)
        if ended is None:
            return Outcome.OPEN if attempt.outcome is None else Outcome.FAILED
        if row_of(ended.kind).domain not in (Domain.HARDWARE, Domain.PLATFORM):
            return Outcome.FAILED
        if ended.next_attempt is None or ended.next_attempt == name:
            return Outcome.OPEN
        name = ended.next_attempt
    return Outcome.OPEN


def _queued(timeline: Timeline, begin: float, end: float) -> bool:
    """Whether it waited for nodes within a time."""
    return any(begin <= ts <= end and status is Status.QUEUED for ts, status in timeline.record.statuses)


def by_people(timeline: Timeline, thoughts: Mapping[tuple[str, Later], Afterthought]) -> Iterator[Try]:
    """What people did: answers to halts, rollbacks and settings."""
    for halt in timeline.report.halts:
        row = timeline.rows.get(halt.incident or "")
        answer = timeline.answer_to(halt)
        if row is None or row.drill is not None or answer is None or not isinstance(answer.event, e.ResumeRequested):
            continue
        judged = [thoughts.get((row.incident, kind)) for kind in (Later.NEVER_RETURNED, Later.RETURNED)]
        known = next((_BY_VERDICT[each.verdict] for each in judged if each is not None), Outcome.OPEN)
        begun = timeline.record.state.attempts.get(timeline.first_attempt_after(answer.ts) or "")
        down = begun.first_step_at - halt.at if begun is not None and begun.first_step_at is not None else None
        yield Try(failure=row.kind, strategy=RESUMED, outcome=known, anchor=f"e{answer.seq}", seconds_down=down)
    for row in timeline.report.incidents:
        request = timeline.record.state.changes.get(str(row.evidence.get("request")))
        if request is None or row.next_attempt is None:
            continue
        verb = "rolled back by a person" if row.action == Action.ROLLBACK else "settings changed by a person"
        rate = [f"learning rate {request.lr:g}"] if request.lr is not None else []
        yield Try(
            failure=_answered(timeline, row),
            strategy=", ".join([verb, *rate, *_changes(row.lr_factor, row.settings, row.skip_batches)]),
            outcome=_of_request(timeline, row),
            anchor=row.incident,
            seconds_down=row.seconds_down,
            steps_lost=row.steps_discarded or 0,
        )


def _answered(timeline: Timeline, row: IncidentReport) -> str:
    """The trouble with the loss that a person's change is probably about: the newest, if it was near."""
    here = timeline.step_of(row)
    for _, alert in reversed(timeline.alerts):
        near = alert.step is not None and here - SETTLED_STEPS <= alert.step <= here + SETTLED_STEPS
        if alert.at <= row.opened and about_loss(alert.signal) and near:
            return alert.signal
    return row.kind


def _of_request(timeline: Timeline, row: IncidentReport) -> Outcome:
    if row.proven is False:
        return Outcome.FAILED
    limit = timeline.step_of(row) + SETTLED_STEPS
    first = timeline.order.get(row.next_attempt or "", 0)
    later = (each for each in timeline.failures_after(row.opened) if about_loss(each.kind))
    if any(timeline.order.get(each.attempt or "", -1) >= first and timeline.step_of(each) <= limit for each in later):
        return Outcome.FAILED
    return Outcome.WORKED if timeline.reached(limit, row.next_attempt) is not None else Outcome.OPEN
