"""What people send each other: the progress note at a share of the work, and the hand-over to the next shift.

Both are Markdown, drawn from the same record as the logbook; a note about an earlier moment says what was known then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.logbook.drawing.markdown import plain, table
from chronicles.logbook.entries.build import entries
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import front, interrupted, lead, seconds_left, times, totals
from chronicles.logbook.render import newest_loss
from chronicles.logbook.tables import cause, kind
from chronicles.record import LineageRecord, until
from chronicles.report.build import build
from chronicles.wording import count, duration, hours, minute, names, percent, short, whole
from opt_ops.config import Rates
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.text import from_iso
from opt_ops.core.values import Action, Tier, Verdict

Row = Mapping[str, Any]

_LISTED = 12  # events that a progress note tells one by one
_CAUSES = 4  # of lost time
_DAY = 24 * 3600.0


def moment(record: LineageRecord, step: int) -> float | None:
    """When the update of a step that counts was complete; None while there is none."""
    return next((point.ts for _, point in kept_points(record.curves) if point.step >= step), None)


# ---- the progress note ----


def update(record: LineageRecord, at: float, since: float, rates: Rates | None = None) -> str:
    """The note at share `at` of all steps: what has happened since share `since`, in numbers and sentences.

    Raises:
        ValueError: that much is not trained yet; says how much is.
    """
    total = build(record, rates)["total_steps"] or 0
    ends = moment(record, max(1, round(at * total))) if total else None
    if ends is None:
        trained = max((point.step for _, point in kept_points(record.curves)), default=0)
        raise ValueError(f"{whole(trained)} of {whole(total)} steps are trained, which is not {100 * at:g} %")
    begins = moment(record, round(since * total)) if since > 0 else record.started
    assert begins is not None
    then, earlier = until(record, ends), until(record, begins)
    now, before = build(then, rates), build(earlier, rates) if since > 0 else None
    told = [entry for entry in reversed(entries(then, now)) if entry.ts >= begins]
    parts = [
        _head(record, now, at),
        _since(now, before, since, begins, newest_loss(then), newest_loss(earlier)),
        _happened(now, told, begins),
        _numbers(now, before, ends - begins),
        _ahead(now),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _head(record: LineageRecord, now: Row, at: float) -> Iterator[str]:
    run = now["runs"][-1]["run"] if now["runs"] else record.lineage
    yield f"# Lineage {plain(record.lineage)}: {100 * at:g} % update"
    yield ""
    yield f"{minute(from_iso(now['as_of']))}, run {run}, step {whole(now['step'])} of {whole(now['total_steps'])}."
    yield ""


def _since(
    now: Row, before: Row | None, since: float, begins: float, loss: float | None, was: float | None
) -> Iterator[str]:
    known = before["step"] if before else 0
    spent = from_iso(now["as_of"]) - begins
    start = (
        f"Since the {100 * since:g} % update ({minute(begins)})" if before else f"Since the start ({minute(begins)})"
    )
    steps = now["step"] - known
    text = f"{start}, {count(steps, 'step')} were trained in {duration(spent)}"
    if loss is not None:
        text += f"; the loss went from {was:.3f} to {loss:.3f}" if was is not None else f"; the loss is {loss:.3f}"
    yield f"{text}."
    evaluated = list(_evaluated(now, before))
    if evaluated:
        yield f"Loss on validation data: {', '.join(map(plain, evaluated))}."
    share = _stretch_goodput(now, before)
    if share is not None:
        whole_share = percent(now["goodput"]["goodput"])
        yield f"Goodput was {percent(share)} in that time" + (f", {whole_share} over all." if before else ".")
    yield ""


def _evaluated(now: Row, before: Row | None) -> Iterator[str]:
    """`wiki 3.412 → 3.208`: by corpus, at the note before and now; then, where it rises, the lowest."""
    known = {row["corpus"]: row["loss"] for row in before["validation"]} if before else {}
    for row in now["validation"]:
        if row["loss"] is None:
            continue
        was = known.get(row["corpus"])
        text = f"{short(row['corpus'], 60)} " + (f"{was:.3f} → " if was is not None else "") + f"{row['loss']:.3f}"
        lower = row["lowest"] < row["loss"]
        yield text + (f" (lowest {row['lowest']:.3f} after step {whole(row['lowest_step'])})" if lower else "")


def _stretch_goodput(now: Row, before: Row | None) -> float | None:
    spent, known = now["goodput"], before["goodput"] if before else {"kept_steps": 0, "wall_seconds": 0.0}
    wall = spent["wall_seconds"] - known["wall_seconds"]
    if not spent["healthy_step_seconds"] or wall <= 0:
        return None
    return (spent["kept_steps"] - known["kept_steps"]) * spent["healthy_step_seconds"] / wall


def _happened(now: Row, told: Sequence[LogEntry], begins: float) -> Iterator[str]:
    rows = [row for row in now["incidents"] if from_iso(row["opened"]) >= begins]
    yield "## What happened"
    yield ""
    if not rows:
        yield "No incident."
    else:
        yield f"{count(len(rows), 'incident')}{interrupted(rows)}: {_classes(rows)}. {_handled(now, rows, begins)}"
    yield ""
    large = [entry for entry in told if _is_large(entry)]
    for entry in large[:_LISTED]:
        yield f"- {plain(entry.title)}"
    if len(large) > _LISTED:
        yield f"- And {count(len(large) - _LISTED, 'more')}, in the logbook."
    if large:
        yield ""


def _classes(rows: Sequence[Row]) -> str:
    kinds = Counter(kind(row["kind"]) for row in rows)
    return names([f"{name} × {number}" if number > 1 else name for name, number in kinds.most_common()])


def _handled(now: Row, rows: Sequence[Row], begins: float) -> str:
    calls = [row for row in now["halts"] if from_iso(row["at"]) >= begins]
    rollbacks = [row for row in rows if row["action"] == Action.ROLLBACK and not row["advice"]]
    nodes = sorted({node for row in rows for node in row["excluded"]})
    told = [f"{count(len(rollbacks), 'rollback')}, " if rollbacks else ""]
    told.append(f"{count(totals(rows)['steps_lost'], 'step')} lost")
    told.append(f", {count(len(nodes), 'node')} taken out" if nodes else "")
    human = f"A human was needed {times(len(calls))}." if calls else "No human was needed."
    return f"{''.join(told)}. {human}"


def _is_large(entry: LogEntry) -> bool:
    """What a reader a year later wants to know of: settings, versions, sizes, halts and people's decisions."""
    row = entry.incident
    if row is not None:
        return row["action"] in (Action.ROLLBACK, Action.CHANGE, Action.HALT) and not row["advice"]
    words = ("versions", "halted", "paused", "shrunk", "growing", "note", "took over", "completed", "cancelled")
    return entry.qualifier.startswith(words)


def _numbers(now: Row, before: Row | None, seconds: float) -> Iterator[str]:
    spent = now["goodput"]
    known = before["goodput"] if before else None

    def both(label: str, key: str, told: Any) -> list[str]:
        stretch = spent[key] - known[key] if known and spent[key] is not None else spent[key]
        return [label, told(stretch), told(spent[key])]

    rows = [
        ["wall clock", duration(seconds), duration(spent["wall_seconds"])],
        ["kept steps", whole(now["step"] - (before["step"] if before else 0)), whole(now["step"])],
        ["goodput", percent(_stretch_goodput(now, before)), percent(spent["goodput"])],
        both("steps repeated", "steps_repeated", whole),
        both("failures", "failures", whole),
        both("automatic restarts", "restarts_automatic", whole),
        both("manual restarts", "restarts_manual", whole),
        both("calls", "calls", whole),
        both("node-hours", "node_hours", hours),
        both("node-hours lost", "node_hours_lost", hours),
    ]
    yield "## Numbers"
    yield ""
    yield from table(["", ">Since then", ">So far"], rows)
    yield ""
    lost = [(row["kind"], row["seconds"] - _known(known, row["kind"])) for row in spent["lost_by_kind"]]
    most = sorted((item for item in lost if item[1] > 0), key=lambda item: -item[1])[:_CAUSES]
    if most:
        told = ", ".join(f"{cause(name)} {duration(each)}" for name, each in most)
        yield f"The time since then went most to: {told}."
        yield ""


def _known(spent: Row | None, kind_: str) -> float:
    rows = spent["lost_by_kind"] if spent else ()
    return next((row["seconds"] for row in rows if row["kind"] == kind_), 0.0)


def _ahead(now: Row) -> Iterator[str]:
    left = None if now["ended"] else seconds_left(now)
    if left is not None:
        ends = minute(from_iso(now["as_of"]) + left)
        yield f"At the goodput so far, the rest takes {duration(left)}: until {ends}."
        yield ""
    yield from _questions(now)


def _questions(now: Row) -> Iterator[str]:
    found = front(now, None)["questions"]
    yield "## Open"
    yield ""
    yield from [f"- {plain(question)}" for question in found] or ["Nothing."]
    yield ""


# ---- the hand-over ----


def handover(record: LineageRecord, hours: float = 12.0, rates: Rates | None = None) -> str:
    """For the next shift: where it stands, what is open, what to watch, and what was done in the last hours."""
    now = build(record, rates)
    as_of = record.as_of or 0.0
    since = as_of - timedelta(hours=hours).total_seconds()
    told = [entry for entry in reversed(entries(record, now)) if entry.ts >= since]
    parts = [
        [f"# Lineage {plain(record.lineage)}: hand-over, {minute(as_of)}", ""],
        [f"**{now['status']}.** {plain(lead(now))}", ""],
        _questions(now),
        _watch(record, now, as_of, since),
        _done(told, hours),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _watch(record: LineageRecord, now: Row, as_of: float, since: float) -> Iterator[str]:
    yield "## To watch"
    yield ""
    found = [*_holdings(record.state, as_of), *_weights(record.state, now), *_signs(record, since), *_suspects(now)]
    yield from [f"- {plain(sentence)}" for sentence in found] or ["Nothing."]
    yield ""


def _holdings(state: State, as_of: float) -> Iterator[str]:
    if state.ended:
        return
    attempt = state.attempt
    if attempt is not None and attempt.live and attempt.nodes:
        out = {node.name for node in state.nodes.values() if node.excluded_by}
        spare = state.held.keys() - set(attempt.nodes) - out
        yield f"{count(len(spare), 'spare node')} held beside the {len(attempt.nodes)} that train."
    for allocation in state.live_allocations:
        if allocation.ends_at is not None and allocation.ends_at - as_of < _DAY:
            yield f"Job {allocation.job} reaches its time limit at {minute(allocation.ends_at)}."
        elif allocation.pending:
            yield f"Job {allocation.job} waits in the queue for {count(allocation.wanted, 'node')}."


def _weights(state: State, now: Row) -> Iterator[str]:
    good = [row for row in now["checkpoints"] if row["verified"] and row["healthy"]]
    if good and not state.ended:
        last = good[-1]
        behind = now["step"] - last["step"]
        yield f"The newest good checkpoint is that of step {whole(last['step'])}, {count(max(0, behind), 'step')} back."
    bad = [row for row in now["checkpoints"] if row["verified"] is False]
    if bad:
        yield f"{count(len(bad), 'checkpoint')} refused as damaged; the newest is step {whole(bad[-1]['step'])}."
    scale = now["runs"][-1]["lr_scale"] if now["runs"] else 1.0
    if scale != 1 and state.status is not Status.COMPLETED:
        yield f"The learning rate is × {scale:.3g} of the schedule's, after {count(len(now['runs']) - 1, 'change')}."


def _signs(record: LineageRecord, since: float) -> Iterator[str]:
    alerts = Counter(
        signal.signal for signal in record.state.signals.values() if signal.tier is Tier.ALERT and signal.at >= since
    )
    for name, number in alerts.most_common():
        yield f"{count(number, 'alert')} of {name.replace('_', ' ')}, on which nothing was touched."


def _suspects(now: Row) -> Iterator[str]:
    for row in now["nodes"]:
        if row["verdict"] == Verdict.SUSPECT and not row["excluded_by"]:
            yield f"{row['node']} is suspect: {row['reason'].replace('_', ' ')}."


def _done(told: Sequence[LogEntry], hours: float) -> Iterator[str]:
    yield f"## Done in the last {hours:g} hours"
    yield ""
    for entry in told:
        cost = next((fact.text for fact in entry.facts if fact.label == "Cost"), "")
        yield f"- {plain(f'{entry.title}. {cost}'.rstrip())}"
    if not told:
        yield "Nothing had to be done."
    yield ""
