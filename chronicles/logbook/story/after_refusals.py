"""Afterthoughts on proposals that were declined, or not answered in time: whether that was right, or what it cost."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.logbook.story.model import Afterthought, Judged, Later
from chronicles.logbook.story.timeline import Timeline
from chronicles.record import Moment
from chronicles.report.model import IncidentReport
from chronicles.wording import count, duration, full, short, uncapitalized, whole
from opt_ops.core.decide.trouble import about_loss
from opt_ops.core.failures.classes import title
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import Proposal
from opt_ops.core.values import Action, ProposalStatus

SETTLED_STEPS = 500  # beyond the place of a failure
_INSTEAD_SECONDS = 600.0  # a rollback that a person asks for so soon is done instead of what was proposed


def after_refusals(timeline: Timeline) -> Iterator[Afterthought]:
    """At most one afterthought for each incident whose recovery was proposed and not done."""
    for row in timeline.report.incidents:
        proposal = timeline.record.state.incidents[row.incident].proposal
        if proposal is None or proposal.answer is None or not proposal.is_refused or row.drill is not None:
            continue
        found = _while_training(timeline, row, proposal) if proposal.made.trains else _standing(timeline, row, proposal)
        if found is not None:
            yield found


def _standing(timeline: Timeline, row: IncidentReport, proposal: Proposal) -> Afterthought | None:
    """Nothing trained when it was refused: how long that lasted."""
    refused_at, step = proposal.answered_at or 0.0, (proposal.answer.step if proposal.answer else None) or 0
    own = timeline.order.get(row.attempt or "", -1)
    for ts, place, newest in timeline.progress:
        if place == own and newest > step and ts > refused_at:
            text = f"The attempt went on by itself, to step {whole(newest)}: it was not needed."
            return _thought(row, proposal, ts, Judged.RIGHT, text)
    later = list(timeline.record.state.attempts.values())[own + 1 :]
    again = next((each for each in later if each.first_step_at is not None), None)
    if again is None or again.first_step_at is None:
        return None
    stood = duration(again.first_step_at - refused_at)
    text = f"Nothing trained for {stood} after that, until {again.name} made its first step."
    return _thought(row, proposal, again.first_step_at, Judged.COSTLY, text)


def _while_training(timeline: Timeline, row: IncidentReport, proposal: Proposal) -> Afterthought | None:
    """Training went on: whether the trouble went away, came again, or was rolled back after all."""
    refused_at, step = proposal.answered_at or 0.0, (proposal.answer.step if proposal.answer else None) or 0
    again = _next_trouble(timeline, row)
    if (back := _rolled_back(timeline, row, refused_at)) is not None:
        behind = timeline.rows.get(back.incident or "")
        if not (behind is not None and behind.is_failure) and back.planned_at - refused_at < _INSTEAD_SECONDS:
            return None
        before = [newest for ts, _, newest in timeline.progress if refused_at < ts <= back.planned_at]
        went = f"Training went back to step {whole(back.checkpoint.step if back.checkpoint else 0)} after all"
        text = (
            f"{went}: {count(max(0, max(before, default=step) - step), 'step')} that were trained since were discarded."
        )
        because = (back.incident,) if back.incident and back.incident != row.incident else ()
        return _thought(row, proposal, back.planned_at, Judged.COSTLY, text, because)
    if again is not None:
        text = f"It came again: {uncapitalized(title(again.kind))} at step {whole(timeline.step_of(again))}."
        return _thought(row, proposal, again.opened, Judged.COSTLY, text, (again.incident,))
    return _passed(timeline, row, proposal, step)


def _passed(timeline: Timeline, row: IncidentReport, proposal: Proposal, step: int) -> Afterthought | None:
    """A healthy checkpoint far behind the place shows that the trouble with the loss went away."""
    limit = timeline.step_of(row) + SETTLED_STEPS
    known = timeline.record.state.checkpoints.values()
    good = next((each for each in known if each.good and each.checkpoint.step >= limit), None)
    if good is None or not about_loss(row.kind):
        return None
    healthy = f"The trouble went away by itself: the checkpoint of step {whole(good.checkpoint.step)} is healthy"
    decided = proposal.made.decided
    discards = step - decided.checkpoint.step if decided.action is Action.ROLLBACK and decided.checkpoint else 0
    saved = f". The rollback would have discarded {count(discards, 'step')}" if discards > 0 else ""
    return _thought(row, proposal, good.seen_at, Judged.RIGHT, f"{healthy}{saved}.")


def _next_trouble(timeline: Timeline, row: IncidentReport) -> IncidentReport | None:
    """The next incident of the same sort, at most so far behind the place."""
    limit = timeline.step_of(row) + SETTLED_STEPS
    for each in timeline.failures_after(row.opened):
        alike = each.kind == row.kind or (about_loss(each.kind) and about_loss(row.kind))
        if alike and timeline.step_of(each) <= limit:
            return each
    return None


def _rolled_back(timeline: Timeline, row: IncidentReport, refused_at: float) -> Run | None:
    """The first run after it that began before the place of the trouble, if the trouble was not far behind by then."""
    place = row.onset or timeline.step_of(row)
    settled = timeline.reached(timeline.step_of(row) + SETTLED_STEPS, row.attempt)
    for run in timeline.record.state.runs.values():
        begins = run.checkpoint.step if run.checkpoint else 0
        if run.planned_at > refused_at and begins <= place and (settled is None or run.planned_at < settled):
            return run
    return None


def _thought(
    row: IncidentReport, proposal: Proposal, at: float, verdict: Judged, text: str, because: tuple[str, ...] = ()
) -> Afterthought:
    answer = proposal.answer
    assert answer is not None
    what = {Action.ROLLBACK: "The rollback", Action.RESTART: "The restart"}.get(proposal.made.decided.action, "It")
    how = "was not done, because nobody answered"
    if answer.status is ProposalStatus.DECLINED:
        how = f"was declined by {short(answer.author or 'a person', 40)}"
    return Afterthought(
        anchor=row.incident,
        at=Moment(at),
        kind=Later.REFUSED,
        verdict=verdict,
        text=f"{full(f'{what} {how}')} {text}",
        because=because,
        next=None,
    )
