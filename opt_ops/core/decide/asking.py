"""Asks a person before a recovery, where the driver is `ask`: a proposal stands between a decision and its effects.

A proposal is made from the decision that the playbook would take, and the same decision is made anew at every look. As
long as it is the same one, the proposal holds: it waits for an answer, or for its deadline. What the answer leads to is
the decision itself, or the same decision as advice. So a daemon that is killed anywhere finds either an open proposal,
or an answer that nothing was done about yet.

Nobody is asked about what takes no training away: taking over what runs, telling people, halting, taking out a spare,
and moves that save first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from opt_ops.core.decide.policy import AskRule, Policy
from opt_ops.core.events import Event, ProposalAnswered, ProposalMade, RecoveryDecided
from opt_ops.core.failures.classes import FailureClass, Nature, nature
from opt_ops.core.names import proposal_name
from opt_ops.core.state.model import Incident, Proposal, State
from opt_ops.core.state.queries import last_step
from opt_ops.core.values import Action, AskDefault, Driver, ProposalStatus
from opt_ops.core.waiting import still_waiting

ASKED = (Action.REPLACE_RANKS, Action.RESTART, Action.ROLLBACK)
"""The actions that a person may be asked about."""


def ask_first(state: State, incident: Incident, decided: RecoveryDecided, now: float, policy: Policy) -> Event | None:
    """What becomes of a decision: a proposal, its end, or the decision itself. None: the proposal waits."""
    proposal = incident.proposal
    if proposal is not None and proposal.status is ProposalStatus.OPEN:
        return _look_at(state, proposal, _why_withdrawn(state, incident, decided, policy), now)
    if proposal is not None and proposal.is_refused:
        return replace(proposal.made.decided, advice=True, why=f"{_answer(proposal)}; {proposal.made.decided.why}")
    fell_back = proposal is not None and incident.fell_back is not None  # the rung after it was shown as well
    if fell_back or not _is_asked(state, incident, decided):
        return decided
    if overtaken := _overtaken(state, incident, policy):
        return replace(decided, advice=True, why=f"nobody was asked: {overtaken}; {decided.why}")
    if (
        proposal is None
        or proposal.status is ProposalStatus.WITHDRAWN
        or _shown(proposal.made.decided) != _shown(decided)
    ):
        return _propose(state, incident, decided, _rule(incident.kind, policy), now)
    return replace(decided, why=f"{_answer(proposal)}; {decided.why}")


def withdraw_all(state: State) -> ProposalAnswered | None:
    """Withdraw what a lineage that has ended still asks."""
    for incident in (state.incidents[name] for name in state.open_incidents):
        proposal = incident.proposal
        if proposal is not None and proposal.status is ProposalStatus.OPEN:
            return _withdrawn(state, proposal, f"the lineage is {state.status}")
    return None


def expired(state: State, proposal: Proposal) -> ProposalAnswered:
    """The end of a proposal that nobody has answered by its deadline."""
    return _over(state, proposal, ProposalStatus.EXPIRED, "nobody answered by the deadline")


def can_wait(kind: str, policy: Policy) -> bool:
    """Whether training survives failures of this class, so that a decision about one can wait for a person."""
    return _rule(kind, policy).default is AskDefault.WAIT


def _rule(kind: str, policy: Policy) -> AskRule:
    playbook = policy.playbook_for(kind)
    return playbook.ask if playbook is not None else AskRule()


def _is_asked(state: State, incident: Incident, decided: RecoveryDecided) -> bool:
    if state.driver is not Driver.ASK or decided.advice or nature(incident.kind, incident.signal) is Nature.MOVE:
        return False
    return decided.action in ASKED and (not state.ask.only or decided.action in state.ask.only)


def _overtaken(state: State, incident: Incident, policy: Policy) -> str:
    """Why there is nothing left to ask about a failure that training would have survived; empty: there is."""
    if not can_wait(incident.kind, policy):
        return ""
    attempt = state.attempts.get(incident.attempt or "")
    if attempt is not None and not attempt.live:
        return f"attempt {attempt.name} has ended"
    other = next(_urgent(state, incident, policy), None)
    return f"{other.name} goes first: {other.cause}" if other is not None else ""


def _urgent(state: State, incident: Incident, policy: Policy) -> Iterator[Incident]:
    """Later incidents of the same attempt that cannot wait."""
    later = state.open_incidents[state.open_incidents.index(incident.name) + 1 :]
    for other in (state.incidents[name] for name in later):
        watched = other.kind == FailureClass.DAEMON_RESTART or can_wait(other.kind, policy)
        if other.attempt == incident.attempt and not watched:
            yield other


def _why_withdrawn(state: State, incident: Incident, decided: RecoveryDecided, policy: Policy) -> str:
    """Why what an open proposal shows no longer holds; empty: it holds."""
    proposal = incident.proposal
    assert proposal is not None
    if state.driver is not Driver.ASK:
        return f"the driver is {state.driver} now"
    if incident.answered:
        return "a person has decided otherwise"
    if overtaken := _overtaken(state, incident, policy):
        return overtaken
    newer = (each for each in _urgent(state, incident, policy) if each.opened_at > proposal.at)
    if (other := next(newer, None)) is not None:
        return f"{other.name} was opened: {other.cause}"
    if not _is_asked(state, incident, decided) or _shown(decided) != _shown(proposal.made.decided):
        return f"it would be another action now: {decided.action}; {decided.why}"
    return ""


def _look_at(state: State, proposal: Proposal, why: str, now: float) -> ProposalAnswered | None:
    if why:
        return _withdrawn(state, proposal, why)
    if still_waiting(now, proposal.at, proposal.made.deadline - proposal.at):
        return None
    return expired(state, proposal)


def _withdrawn(state: State, proposal: Proposal, why: str) -> ProposalAnswered:
    return _over(state, proposal, ProposalStatus.WITHDRAWN, why)


def _over(state: State, proposal: Proposal, status: ProposalStatus, why: str) -> ProposalAnswered:
    return ProposalAnswered(
        proposal=proposal.name,
        incident=proposal.made.incident,
        status=status,
        reason=why,
        step=last_step(state),
    )


def _propose(state: State, incident: Incident, decided: RecoveryDecided, rule: AskRule, now: float) -> ProposalMade:
    seconds = rule.seconds if state.ask.seconds is None else state.ask.seconds
    return ProposalMade(
        proposal=proposal_name(incident.name, len(incident.proposals) + 1),
        incident=incident.name,
        decided=decided,
        default=state.ask.default or rule.default,
        deadline=now + seconds,
        trains=rule.default is AskDefault.WAIT,
        step=last_step(state),
    )


def _shown(decided: RecoveryDecided) -> tuple[object, ...]:
    """What a person approves. Reasons and counts of budgets may change meanwhile."""
    return (
        decided.action,
        decided.checkpoint,
        decided.lr_factor,
        decided.settings,
        decided.skip_batches,
        decided.skips,
        decided.refuses,
        decided.takes_back,
        decided.exclude,
        decided.nodes,
        decided.ranks,
        decided.save_first,
    )


def _answer(proposal: Proposal) -> str:
    """`approved by ann: the data is fine`."""
    answer = proposal.answer
    assert answer is not None
    if answer.author is None:
        return f"{answer.reason}, and the default is to {proposal.made.default}"
    return f"{answer.status} by {answer.author}{f': {answer.reason}' if answer.reason else ''}"
