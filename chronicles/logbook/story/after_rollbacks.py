"""Afterthoughts on rollbacks: the place was passed, the trouble came back, or it healed by itself the next time."""

from __future__ import annotations

import re
from collections.abc import Iterator

from chronicles.logbook.story.after_alerts import acted_on
from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.report.model import IncidentReport
from chronicles.wording import count, full, uncapitalized, whole
from opt_ops.core import events as e
from opt_ops.core.decide.afterthoughts import Topic
from opt_ops.core.decide.proof import planned_lr
from opt_ops.core.decide.trouble import about_loss
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.failures.classes import title
from opt_ops.core.values import Action, LrFactor

SETTLED_STEPS = 500  # beyond the place of a failure: then what was tried has cured it
_SAME_STEP = 5  # steps between the onsets of one jump, met twice
_SAME_HEIGHT = 0.5  # of the earlier jump: at least so high was the later one
_WORDS = {0.75: "three quarters of the learning rate", 0.5: "half the learning rate"}


def after_rollbacks(timeline: Timeline) -> Iterator[Afterthought]:
    """At most one afterthought for each rollback of a playbook. The journal's own afterthoughts decide first."""
    for row in timeline.report.incidents:
        if is_cured_by_rollback(row):
            found = _came_back(timeline, row) or _healed_again(timeline, row) or _passed(timeline, row)
            if found is not None:
                yield found


def is_cured_by_rollback(row: IncidentReport) -> bool:
    """Whether a playbook answered real trouble with the loss by a rollback that was executed."""
    done = row.action == Action.ROLLBACK and not row.advisory and row.next_attempt is not None
    return done and row.drill is None and about_loss(row.kind)


def _came_back(timeline: Timeline, row: IncidentReport) -> Afterthought | None:
    core = next((each for each in row.afterthoughts if each.topic == Topic.CAME_AGAIN), None)
    named = re.search(r"see (\S+)$", core.text) if core is not None else None
    again = timeline.rows.get(named[1]) if named is not None else _next_trouble(timeline, row)
    if again is None and core is None:
        return None
    text = full(core.text) if core is not None else ""
    if again is not None and not text:
        what = uncapitalized(title(again.kind))
        text = f"It came back: {what} at step {whole(again.onset)}, {_distance(row, again)}."
    return Afterthought(
        anchor=row.incident,
        at=core.at if core is not None else Moment(again.opened if again is not None else row.opened),
        kind=Later.CAME_BACK,
        verdict=Judged.FAILED,
        text=text,
        because=(again.incident,) if again is not None else (),
        next=None,
    )


def _distance(row: IncidentReport, again: IncidentReport) -> str:
    steps = (again.onset or 0) - (row.onset or 0)
    if not steps:
        return "the same step"
    return f"{count(abs(steps), 'step')} {'behind' if steps > 0 else 'before'} the first time"


def _next_trouble(timeline: Timeline, row: IncidentReport) -> IncidentReport | None:
    """The next incident with the loss on the way past the place."""
    limit = timeline.step_of(row) + SETTLED_STEPS
    later = (each for each in timeline.failures_after(row.opened) if about_loss(each.kind))
    return next((each for each in later if _is_later(timeline, row, each.attempt) and (each.onset or 0) <= limit), None)


def _is_later(timeline: Timeline, row: IncidentReport, attempt: str | None) -> bool:
    return timeline.order.get(attempt or "", -1) >= timeline.order.get(row.next_attempt or "", 0)


def _healed_again(timeline: Timeline, row: IncidentReport) -> Afterthought | None:
    core = next((each for each in row.afterthoughts if each.topic == Topic.NOT_NEEDED), None)
    met = next((x for x in _met_again(timeline, row) if core is not None or _is_as_high(row, x[1])), None)
    if met is None and core is None:
        return None
    cut, command = _cut(timeline, row)
    text = full(core.text.partition(". This takes it back")[0]) if core is not None else ""
    if met is not None:
        _, alert = met
        again = f"The jump came again at step {whole(alert.onset_step)}{_as_high(row, alert)}, and healed by itself."
        text = (
            f"{again} It was the data of these batches, not the learning rate: {cut or 'the rollback'} was not needed."
        )
    in_force = " It is still in force." if command else ""
    return Afterthought(
        anchor=row.incident,
        at=Moment(met[0].ts) if met is not None else core.at if core is not None else row.opened,
        kind=Later.HEALED_AGAIN,
        verdict=Judged.NOT_NEEDED,
        text=f"{text}{in_force}",
        because=(f"e{met[0].seq}",) if met is not None else (),
        next=command,
    )


def _met_again(timeline: Timeline, row: IncidentReport) -> Iterator[tuple[e.Entry, e.SignalRaised]]:
    """Alerts at the same step of a later attempt that went on past it and became no incident."""
    heals = SpikeRule().heal_steps
    for entry, alert in timeline.alerts:
        if alert.signal != row.kind or alert.onset_step is None or row.onset_step is None:
            continue
        if not _is_later(timeline, row, alert.attempt) or abs(alert.onset_step - row.onset_step) > _SAME_STEP:
            continue
        known = timeline.record.state.attempts[alert.attempt]
        if not acted_on(timeline, alert) and (known.last_step or 0) > alert.onset_step + heals:
            yield entry, alert


def _height(evidence: object) -> float | None:
    """How far the loss was above its usual level, by the evidence."""
    if not isinstance(evidence, dict):
        return None
    loss, usual = evidence.get("loss"), evidence.get("median")
    return loss - usual if isinstance(loss, (int, float)) and isinstance(usual, (int, float)) else None


def _is_as_high(row: IncidentReport, alert: e.SignalRaised) -> bool:
    before, again = _height(dict(row.evidence)), _height(dict(alert.evidence))
    return before is None or again is None or again >= _SAME_HEIGHT * before


def _as_high(row: IncidentReport, alert: e.SignalRaised) -> str:
    before, again = _height(dict(row.evidence)), _height(dict(alert.evidence))
    if before is None or again is None or before <= 0:
        return ""
    if again >= 1.1 * before:
        return ", higher than before"
    return ", as high as before" if again >= 0.9 * before else f", {again / before:.0%} as high as before"


def _cut(timeline: Timeline, row: IncidentReport) -> tuple[str, str | None]:
    """What was cut; and the command that takes it back, while it is in force and somebody could want that."""
    state = timeline.record.state
    if row.lr_factor is None:
        return "", None
    run, attempt = state.run, state.attempt
    ours = LrFactor(step=row.checkpoint_step or 0, factor=row.lr_factor)
    if run is None or attempt is None or state.ended or ours not in run.lr_factors:
        return "the cut of the learning rate", None
    plan = planned_lr(state, attempt)
    lr = plan.at((attempt.last_step or 0) + 1) if plan is not None else None
    command = f"opt-ops run set {state.intent.lineage} lr={lr / row.lr_factor:.6g}" if lr else None
    return "the cut of the learning rate", command


def _passed(timeline: Timeline, row: IncidentReport) -> Afterthought | None:
    limit = timeline.step_of(row) + SETTLED_STEPS
    at = timeline.reached(limit, row.next_attempt)
    if at is None:
        return None
    cured = next((each for each in row.afterthoughts if each.topic == Topic.CURED), None)
    first = row.checkpoint_step or 0
    jumps = [
        entry
        for entry, alert in timeline.alerts
        if about_loss(alert.signal) and _is_later(timeline, row, alert.attempt) and first <= (alert.step or 0) <= limit
    ]
    text = f"Training passed the place{_under(row)} and {SETTLED_STEPS} steps more"
    healed = f"; {count(len(jumps), 'jump')} on the way healed without help" if jumps else " without an alert"
    limits = f" {_LIMIT}" if row.lr_factor is not None else ""
    return Afterthought(
        anchor=row.incident,
        at=Moment(at),
        kind=Later.PASSED,
        verdict=Judged.WORKED,
        text=f"{text}{healed}.{limits}" + (f" {full(cured.text)}" if cured is not None else ""),
        because=tuple(f"e{entry.seq}" for entry in jumps),
        next=None,
    )


_LIMIT = "Whether the learning rate or the other order of events did it is not known."


def _under(row: IncidentReport) -> str:
    """Under which change the place was passed: `at three quarters of the learning rate`."""
    if row.lr_factor is not None:
        return f" at {_WORDS.get(row.lr_factor, f'{row.lr_factor:g} times the learning rate')}"
    return " without the batches that were skipped" if row.skip_batches else ""
