"""Answers of people to proposals: an answer holds for what is open, and if it was given before the deadline.

A request may wait in the inbox while no daemon runs. What counts is when it was made, not when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from opt_ops.core.events import Event, ProposalAnswered
from opt_ops.core.state.model import Proposal, State
from opt_ops.core.state.queries import last_step, open_proposals
from opt_ops.core.text import clock
from opt_ops.core.values import AskDefault, ProposalStatus
from opt_ops.ports import Request
from opt_ops.supervise.request_arguments import LONGEST_REASON, Arguments, InvalidRequest


def approved(state: State, request: Request) -> Event:
    """The event of an approval.

    Raises:
        InvalidRequest: the proposal is not open, or the approval was given after its deadline.
    """
    return _answer(state, request, ProposalStatus.APPROVED)


def declined(state: State, request: Request) -> Event:
    """The event of a refusal; raises as `approved`."""
    return _answer(state, request, ProposalStatus.DECLINED)


def _answer(state: State, request: Request, status: ProposalStatus) -> ProposalAnswered:
    """The answer to an open proposal. It is named by itself, or by its incident."""
    given = Arguments(request.arguments)
    name, waiting = given.text("proposal"), open_proposals(state)
    found = next((each for each in waiting if name in (each.name, each.made.incident)), None)
    if found is None:
        raise InvalidRequest(f"{_why_not_open(state, name)}; {_open_now(waiting)}")
    if request.asked_at is not None and request.asked_at >= found.made.deadline:
        raise InvalidRequest(_too_late(found, request.asked_at))
    return ProposalAnswered(
        proposal=found.name,
        incident=found.made.incident,
        status=status,
        reason=given.text("reason", LONGEST_REASON, ""),
        step=last_step(state),
        author=request.author,
        request=request.request,
    )


def _why_not_open(state: State, name: str) -> str:
    made = [each for incident in state.incidents.values() for each in incident.proposals]
    known = next((each for each in reversed(made) if name in (each.name, each.made.incident)), None)
    if known is None or known.answer is None:
        return f"{name} is no proposal that waits"
    by = f" by {known.answer.author}" if known.answer.author else ""
    at = clock(known.answered_at or 0.0)
    return f"{known.name} was {known.status}{by} at {at}{f': {known.answer.reason}' if known.answer.reason else ''}"


def _too_late(proposal: Proposal, asked_at: float) -> str:
    then = "it is done" if proposal.made.default is AskDefault.ACT else "it is not done"
    return (
        f"the deadline of {proposal.name} was {clock(proposal.made.deadline)}, and this answer was given at "
        f"{clock(asked_at)}: without an answer in time, {then}"
    )


def _open_now(waiting: Sequence[Proposal]) -> str:
    return f"open now: {', '.join(each.name for each in waiting)}" if waiting else "no proposal is open now"
