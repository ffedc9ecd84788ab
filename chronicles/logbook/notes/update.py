"""Notes that people send each other: the progress note at a share of the work, and the handover to the next shift.

Both are Markdown, drawn from the same record as the logbook. A note about an earlier time says what was known then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from chronicles.kept_curve import kept_points
from chronicles.ledger.summary import LedgerSummary
from chronicles.logbook.drawing.markdown import plain, table
from chronicles.logbook.entries.build import entries
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import (
    interrupted,
    recovered_in_place,
    seconds_left,
    times,
    totals,
)
from chronicles.logbook.open_questions import questions
from chronicles.logbook.render import newest_loss
from chronicles.logbook.tables import cause
from chronicles.record import LineageRecord, until
from chronicles.report.build import build
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import count, duration, hours, minute, names, percent, short, uncapitalized, whole
from opt_ops.config import Rates
from opt_ops.core.failures.classes import title
from opt_ops.core.values import Action

_LISTED = 12  # entries that a progress note lists one by one
_CAUSES = 4  # of lost time
_DAY = 24 * 3600.0


def moment_of(record: LineageRecord, step: int) -> float | None:
    """When the kept update of a step was complete; None while there is none."""
    return next((point.ts for _, point in kept_points(record.curves) if point.step >= step), None)


# ---- the progress note ----


def update(record: LineageRecord, at: float, since: float, rates: Rates | None = None) -> str:
    """Write the progress note at share `at` of all steps, about what has happened since share `since`.

    Raises:
        ValueError: fewer steps are trained than `at` needs.
    """
    total = build(record, rates).total_steps or 0
    ends = moment_of(record, max(1, round(at * total))) if total else None
    if ends is None:
        trained = max((point.step for _, point in kept_points(record.curves)), default=0)
        raise ValueError(f"{whole(trained)} of {whole(total)} steps are trained, which is less than {100 * at:g} %")
    begins = moment_of(record, round(since * total)) if since > 0 else record.started
    assert begins is not None
    then, earlier = until(record, ends), until(record, begins)
    now, before = build(then, rates), build(earlier, rates) if since > 0 else None
    log = [entry for entry in reversed(entries(then, now)) if entry.ts >= begins]
    parts = [
        _head(record, now, at),
        _since(now, before, since, begins, newest_loss(then), newest_loss(earlier)),
        _happened(now, log, begins),
        _numbers(now, before, ends - begins),
        _ahead(now),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _head(record: LineageRecord, now: LineageReport, at: float) -> Iterator[str]:
    run = now.runs[-1].run if now.runs else record.lineage
    yield f"# Lineage {plain(record.lineage)}: {100 * at:g} % update"
    yield ""
    yield f"{minute(now.as_of or 0.0)}, run {run}, step {whole(now.step)} of {whole(now.total_steps)}."
    yield ""


def _since(
    now: LineageReport, before: LineageReport | None, since: float, begins: float, loss: float | None, was: float | None
) -> Iterator[str]:
    start = f"the {100 * since:g} % update" if before else "the start"
    steps = now.step - (before.step if before else 0)
    spent = duration((now.as_of or 0.0) - begins)
    text = f"Since {start} ({minute(begins)}), {count(steps, 'step')} were trained in {spent}"
    if loss is not None:
        text += f"; the loss went from {was:.3f} to {loss:.3f}" if was is not None else f"; the loss is {loss:.3f}"
    yield f"{text}."
    evaluated = list(_evaluated(now, before))
    if evaluated:
        yield f"Loss on validation data: {', '.join(map(plain, evaluated))}."
    share = _goodput_between(now, before)
    if share is not None:
        overall = f", and {percent(now.ledger.goodput)} over all" if before else ""
        yield f"Goodput was {percent(share)} in that time{overall}."
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


def _goodput_between(now: LineageReport, before: LineageReport | None) -> float | None:
    """Goodput between two notes, by the healthy step of the later one."""
    spent, known = now.ledger, before.ledger if before else None
    wall = spent.wall_seconds - (known.wall_seconds if known else 0.0)
    if not spent.healthy_step_seconds or wall <= 0:
        return None
    return (spent.kept_steps - (known.kept_steps if known else 0)) * spent.healthy_step_seconds / wall


def _happened(now: LineageReport, log: Sequence[LogEntry], begins: float) -> Iterator[str]:
    rows = [row for row in now.incidents if row.opened >= begins]
    yield "## What happened"
    yield ""
    if not rows:
        yield "No incident."
    else:
        number = f"{count(len(rows), 'incident')}{interrupted(rows)}{recovered_in_place(rows)}"
        yield f"{number}: {_classes(rows)}. {_handled(now, rows, begins)}"
    yield ""
    notable = [entry for entry in log if entry.notable]
    for entry in notable[:_LISTED]:
        yield f"- {plain(entry.heading)}"
    if len(notable) > _LISTED:
        yield f"- And {whole(len(notable) - _LISTED)} more in the logbook."
    if notable:
        yield ""


def _classes(rows: Sequence[IncidentReport]) -> str:
    kinds = Counter(uncapitalized(title(row.kind)) for row in rows)
    return names([f"{name} × {number}" if number > 1 else name for name, number in kinds.most_common()])


def _handled(now: LineageReport, rows: Sequence[IncidentReport], begins: float) -> str:
    halts = sum(halt.at >= begins for halt in now.halts)
    rollbacks = sum(row.action == Action.ROLLBACK and not row.advisory for row in rows)
    nodes = {node for row in rows for node in row.excluded}
    found = [count(rollbacks, "rollback")] if rollbacks else []
    found.append(f"{count(totals(rows).steps_discarded, 'step')} discarded")
    found += [f"{count(len(nodes), 'node')} excluded"] if nodes else []
    human = f"An operator was needed {times(halts)}." if halts else "No operator was needed."
    return f"{', '.join(found)}. {human}"


def _numbers(now: LineageReport, before: LineageReport | None, seconds: float) -> Iterator[str]:
    spent, known = now.ledger, before.ledger if before else None

    def both(label: str, of: Callable[[LedgerSummary], int]) -> list[str]:
        return [label, whole(of(spent) - (of(known) if known else 0)), whole(of(spent))]

    def both_hours(label: str, of: Callable[[LedgerSummary], float | None]) -> list[str]:
        all_hours, earlier = of(spent), of(known) if known else None
        return [label, hours(None if all_hours is None else all_hours - (earlier or 0.0)), hours(all_hours)]

    rows = [
        ["wall clock", duration(seconds), duration(spent.wall_seconds)],
        ["kept steps", whole(now.step - (before.step if before else 0)), whole(now.step)],
        ["goodput", percent(_goodput_between(now, before)), percent(spent.goodput)],
        both("discarded steps", lambda ledger: ledger.steps_discarded),
        both("failures", lambda ledger: ledger.reliability.failures),
        both("recoveries in place", lambda ledger: ledger.reliability.recoveries_in_place),
        both("automatic restarts", lambda ledger: ledger.restarts.automatic),
        both("manual restarts", lambda ledger: ledger.restarts.manual),
        both("times that an operator was needed", lambda ledger: ledger.involvement.pages),
        both_hours("node-hours", lambda ledger: ledger.resources.node_hours),
        both_hours("node-hours lost", lambda ledger: ledger.resources.node_hours_lost),
    ]
    yield "## Numbers"
    yield ""
    yield from table(["", ">Since then", ">So far"], rows)
    yield ""
    earlier = {row.kind: row.seconds for row in known.lost_by_kind} if known else {}
    lost = [(row.kind, row.seconds - earlier.get(row.kind, 0.0)) for row in spent.lost_by_kind]
    most = sorted((item for item in lost if item[1] > 0), key=lambda item: -item[1])[:_CAUSES]
    if most:
        largest = ", ".join(f"{uncapitalized(cause(name))} {duration(each)}" for name, each in most)
        yield f"Most of the time lost since then: {largest}."
        yield ""


def _ahead(now: LineageReport) -> Iterator[str]:
    left = None if now.ended else seconds_left(now)
    if left is not None:
        ends = minute((now.as_of or 0.0) + left)
        yield f"At the goodput so far, the rest takes {duration(left)}, until {ends}."
        yield ""
    yield from _questions(now)


def _questions(now: LineageReport) -> Iterator[str]:
    yield "## Open"
    yield ""
    yield from [f"- {plain(question)}" for question in questions(now)] or ["Nothing."]
    yield ""
