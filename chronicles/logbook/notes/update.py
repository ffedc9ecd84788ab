"""The progress note at a share of the work: what has happened since the note before, and what came of it so far.

Every figure is a difference of two records as they were known at two steps. So the figures since then and those so far
of the note before give those so far of this note.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.ledger.wall_clock import TimePhase
from chronicles.logbook.drawing.markup import plain, table
from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import interrupted, recovered_in_place, times
from chronicles.logbook.notes import happened
from chronicles.logbook.notes.evaluated import newest_evaluation
from chronicles.logbook.notes.happened import Happening, happenings
from chronicles.logbook.notes.moments import known_at, moment_of
from chronicles.logbook.notes.pace import ExpectedEnd, pace
from chronicles.logbook.open_questions import drill_mark, questions
from chronicles.logbook.render import newest_loss
from chronicles.logbook.story.build import story
from chronicles.logbook.tables import cause
from chronicles.record import LineageRecord, Moment
from chronicles.report import encode
from chronicles.report.build import build
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, duration, minute, names, percent, short, uncapitalized, whole
from opt_ops.config import Rates
from opt_ops.core.failures.classes import title
from opt_ops.core.state.queries import total_steps
from opt_ops.core.values import Action

_LISTED = 12  # entries without words of a person that a progress note lists
_CAUSES = 4  # of lost time

_INTERNAL = {"key": ""}  # no field of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What has come together up to a moment, or between two. Fields that grow with time only; None is unknown."""

    wall_seconds: float
    kept_steps: int
    discarded_steps: int
    incidents: int
    drills: int  # of the incidents
    failures: int
    recoveries_in_place: int
    restarts_automatic: int
    restarts_manual: int
    calls: int  # times that an operator was needed
    node_hours: float | None
    node_hours_lost: float | None

    def since(self, earlier: Figures | None) -> Figures:
        """What has come together since an earlier moment."""
        if earlier is None:
            return self
        grown: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            now, then = getattr(self, name), getattr(earlier, name)
            grown[name] = None if now is None else now - (then or 0)
        return Figures(**grown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A progress note as data: `opt-ops logbook update -o json`."""

    lineage: str
    share: float  # of all steps, from 0 to 1
    since_share: float
    begin: Moment = field(metadata={"key": "from"})
    end: Moment = field(metadata={"key": "to"})
    step: int
    steps: int | None
    since_then: Figures
    so_far: Figures
    goodput: float | None  # since then
    expected_end: ExpectedEnd | None
    happened: tuple[Happening, ...]
    evaluation: str | None  # the newest one since then, in words
    before: LineageReport | None = field(metadata=_INTERNAL)  # at `begin`
    now: LineageReport = field(metadata=_INTERNAL)  # at `end`
    losses: tuple[float | None, float | None] = field(metadata=_INTERNAL)


def update(record: LineageRecord, at: float, since: float, rates: Rates | None = None) -> Update:
    """The progress note at share `at` of all steps, about what has happened since share `since`.

    Raises:
        ValueError: fewer steps are trained than `at` needs.
    """
    total = total_steps(record.state) or 0
    trained = max((point.step for _, point in kept_points(record.curves)), default=0)
    reached = total and trained >= max(1, round(at * total))
    ends = moment_of(record, max(1, round(at * total))) if reached else None
    if ends is None:
        raise ValueError(f"{whole(trained)} of {whole(total)} steps are trained, which is less than {100 * at:g} %")
    begins = moment_of(record, max(1, round(since * total))) if since > 0 else None
    then, earlier = known_at(record, ends), known_at(record, begins) if begins is not None else None
    now, before = build(then, rates), build(earlier, rates) if earlier else None
    told = story(then, now, entries(then, now)).entries
    so_far, known, found = _figures(now), _figures(before) if before else None, pace(then.curves)
    left = (now.total_steps or 0) - now.step
    return Update(
        lineage=record.lineage,
        share=at,
        since_share=since,
        begin=Moment(begins if begins is not None else record.started or ends),
        end=Moment(ends),
        step=now.step,
        steps=now.total_steps,
        since_then=so_far.since(known),
        so_far=so_far,
        goodput=_goodput_between(now, before),
        expected_end=found.end(ends, left) if found and left > 0 and not now.ended else None,
        happened=tuple(happenings(then, told, begins if begins is not None else float("-inf"), ends)),
        evaluation=newest_evaluation(now.evaluations, begins if begins is not None else float("-inf"), ends),
        before=before,
        now=now,
        losses=(newest_loss(earlier) if earlier else None, newest_loss(then)),
    )


def row(note: Update) -> dict[str, Any]:
    """The item of `opt-ops logbook update -o json`."""
    return encode.encode(note)


def _figures(report: LineageReport) -> Figures:
    spent = report.ledger
    return Figures(
        wall_seconds=spent.wall_seconds,
        kept_steps=report.step,
        discarded_steps=spent.steps_discarded,
        incidents=len(report.incidents),
        drills=sum(row.drill is not None for row in report.incidents),
        failures=spent.reliability.failures,
        recoveries_in_place=spent.reliability.recoveries_in_place,
        restarts_automatic=spent.restarts.automatic,
        restarts_manual=spent.restarts.manual,
        calls=spent.involvement.pages,
        node_hours=spent.resources.node_hours,
        node_hours_lost=spent.resources.node_hours_lost,
    )


def _goodput_between(now: LineageReport, before: LineageReport | None) -> float | None:
    """Goodput between two notes, by the healthy step of the later one."""
    spent, known = now.ledger, before.ledger if before else None
    wall = spent.wall_seconds - (known.wall_seconds if known else 0.0)
    if not spent.healthy_step_seconds or wall <= 0:
        return None
    return (spent.kept_steps - (known.kept_steps if known else 0)) * spent.healthy_step_seconds / wall


# ---- the note as Markdown ----


def update_text(note: Update) -> str:
    """The progress note in Markdown."""
    parts = [_head(note), _since(note), _happened(note), _numbers(note), _ahead(note)]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _head(note: Update) -> Iterator[str]:
    run = note.now.runs[-1].run if note.now.runs else note.lineage
    yield f"# Lineage {plain(note.lineage)}: {100 * note.share:g} % update"
    yield ""
    yield f"{minute(note.end)}, run {run}, step {whole(note.step)} of {whole(note.steps)}."
    yield ""


def _since(note: Update) -> Iterator[str]:
    start = f"the {100 * note.since_share:g} % update" if note.before else "the start"
    spent, (was, loss) = duration(note.end - note.begin), note.losses
    text = f"Since {start} ({minute(note.begin)}), {count(note.since_then.kept_steps, 'step')} were trained in {spent}"
    if loss is not None:
        text += f"; the loss went from {was:.3f} to {loss:.3f}" if was is not None else f"; the loss is {loss:.3f}"
    yield f"{text}."
    evaluated = list(_evaluated(note.now, note.before))
    if evaluated:
        yield f"Loss on validation data: {', '.join(map(plain, evaluated))}."
    if note.evaluation:
        yield plain(note.evaluation)
    if note.goodput is not None:
        overall = f", and {percent(note.now.ledger.goodput)} over all" if note.before else ""
        yield f"Goodput was {percent(note.goodput)} in that time{overall}."
    yield ""


def _evaluated(now: LineageReport, before: LineageReport | None) -> Iterator[str]:
    """By corpus, at the note before and now, and the lowest if it has risen: `wiki 3.412 → 3.208`."""
    known = {row.corpus: row.loss for row in before.validation} if before else {}
    for row in now.validation:
        if row.loss is None:
            continue
        was = known.get(row.corpus)
        text = f"{short(row.corpus, 60)} " + (f"{was:.3f} → " if was is not None else "") + f"{row.loss:.3f}"
        rises = row.lowest is not None and row.lowest < row.loss
        yield text + (f" (lowest {row.lowest:.3f} after step {whole(row.lowest_step)})" if rises else "")


def _happened(note: Update) -> Iterator[str]:
    rows = [row for row in note.now.incidents if note.before is None or row.opened > note.begin]
    yield "## What happened"
    yield ""
    if rows:
        number = f"{count(len(rows), 'incident')}{_drills(rows)}{interrupted(rows)}{recovered_in_place(rows)}"
        yield f"{number}: {_classes(rows)}. {_handled(note, rows)}"
    else:
        yield "No incident."
    yield ""
    large = [each for each in note.happened if each.large and each.quote is None]
    kept = {id(each) for each in large[:_LISTED]}
    yield from happened.lines([each for each in note.happened if id(each) in kept or each.quote is not None])
    if len(large) > _LISTED:
        yield f"- And {whole(len(large) - _LISTED)} more in the logbook."
    yield ""


def _drills(rows: Sequence[IncidentReport]) -> str:
    drills = sum(row.drill is not None for row in rows)
    if drills == len(rows):
        return ", all of them drills" if drills > 1 else ", a drill"
    return f", {whole(drills)} of them {'drills' if drills > 1 else 'a drill'}" if drills else ""


def _classes(rows: Sequence[IncidentReport]) -> str:
    kinds = Counter(uncapitalized(title(row.kind)) for row in rows)
    return names([f"{name} × {number}" if number > 1 else name for name, number in kinds.most_common()])


def _handled(note: Update, rows: Sequence[IncidentReport]) -> str:
    halts = sum(note.before is None or halt.at > note.begin for halt in note.now.halts)
    rollbacks = sum(row.action == Action.ROLLBACK and not row.advisory for row in rows)
    nodes = {node for row in rows for node in row.excluded}
    found = [count(rollbacks, "rollback")] if rollbacks else []
    found.append(f"{count(note.since_then.discarded_steps, 'step')} discarded")
    found += [f"{count(len(nodes), 'node')} excluded"] if nodes else []
    human = f"An operator was needed {times(halts)}." if halts else "No operator was needed."
    return f"{', '.join(found)}. {human}"


_LABELS = {
    "wall_seconds": "wall clock (h:mm:ss)",
    "kept_steps": "kept steps",
    "discarded_steps": "discarded steps",
    "incidents": "incidents",
    "drills": "of them drills",
    "failures": "failures, without drills",
    "recoveries_in_place": "recoveries in place",
    "restarts_automatic": "automatic restarts",
    "restarts_manual": "manual restarts",
    "calls": "times that an operator was needed",
    "node_hours": "node-hours",
    "node_hours_lost": "node-hours lost",
}


def _numbers(note: Update) -> Iterator[str]:
    earlier = _figures(note.before) if note.before else None
    rows = [
        [label, _shown(name, now := getattr(note.so_far, name), getattr(earlier, name, None)), _shown(name, now)]
        for name, label in _LABELS.items()
    ]
    rows.insert(2, ["goodput", percent(note.goodput), percent(note.now.ledger.goodput)])
    yield "## Numbers"
    yield ""
    yield from table(["", ">Since then", ">So far"], rows)
    yield ""
    largest = list(_lost(note))
    if largest:
        yield "Most of the time lost since then:"
        yield ""
        yield from largest
        yield ""


def _shown(name: str, now: float | None, then: float | None = None) -> str:
    """A figure, or its difference to an earlier one as they are shown: so the columns of two notes add up."""
    if now is None:
        return "–"
    if name == "wall_seconds":
        seconds = round(now) - round(then or 0)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    if name.startswith("node_hours"):
        return f"{round(now, 3) - round(then or 0.0, 3):,.3f}"
    return whole(int(now - (then or 0)))


def _lost(note: Update) -> Iterator[str]:
    """The dearest causes of lost time since then; what drills cost is told apart, by drill."""
    now, before = _lost_seconds(note.now), _lost_seconds(note.before) if note.before else {}
    grown = {key: seconds - before.get(key, 0.0) for key, seconds in now.items()}
    most = sorted((item for item in grown.items() if item[1] > 0), key=lambda item: (-item[1], item[0]))
    for (name, drill), seconds in most[:_CAUSES]:
        yield f"- {plain(f'{drill_mark(drill)}{uncapitalized(cause(name))}')}: {duration(seconds)}"


def _lost_seconds(report: LineageReport) -> Mapping[tuple[str, str], float]:
    """Lost seconds by (failure class or phase, the drill behind it)."""
    rows = {row.incident: row for row in report.incidents}
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for each in report.ledger.lost:
        row = rows.get(each.cause)
        key = (row.kind, row.drill or "") if row else (each.cause, "")
        found[key] += each.seconds_down + each.seconds_repeated
    found.pop((TimePhase.OTHER, ""), None)
    return found


def _ahead(note: Update) -> Iterator[str]:
    end = note.expected_end
    if end is not None:
        same = minute(end.earliest) == minute(end.latest)
        when = minute(end.latest) if same else f"between {minute(end.earliest)} and {minute(end.latest)}"
        yield f"At the pace of the last steps and without a stop, training ends {'at ' if same else ''}{when}."
        yield ""
    yield "## Open"
    yield ""
    yield from [f"- {plain(question)}" for question in questions(note.now)] or ["Nothing."]
    yield ""
