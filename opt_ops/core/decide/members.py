"""Carries out a replacement of ranks: orders it, again after a second loss, or gives it up for a restart.

An order is a generation of the attempt's membership. It ends as joined or as failed, never as both: once it has failed,
the attempt is stopped; once the ranks have joined, that loss calls for no restart any more.
"""

from __future__ import annotations

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.replacement import REPLACEABLE, Replacement, place
from opt_ops.core.events import Event, MembersFailed, MembersIntended, SignalRaised
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.in_place import joined, replacements
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Tier, Verdict
from opt_ops.core.waiting import still_waiting

MOST_GENERATIONS = 3
"""That are ordered for one incident. Who loses ranks again and again is not recovering."""

_LOSSES = REPLACEABLE | {FailureClass.COMMUNICATION}
"""Findings while ranks are being replaced after which others are replaced, too. After any other, nothing in place is
tried any more. A rank that reports a lost connection and leaves is one that is lost."""


def follow_members(state: State, now: float, policy: Policy) -> Event | None:
    """Order the replacement that was decided; after a further loss, order the next one, or give it up."""
    for incident in _under_way(state) if not state.ended else ():
        attempt = state.attempts[incident.attempt or ""]
        if (event := _next(state, incident, attempt, replacements(state, incident), now, policy)) is not None:
            return event
    return None


def is_rejoining(state: State, attempt: str | None) -> bool:
    """Whether ranks of the attempt are being replaced. What is lost meanwhile is replaced for the same incident."""
    return any(incident.attempt == attempt for incident in _under_way(state))


def _under_way(state: State) -> list[Incident]:
    """The incidents for which ranks are being replaced and have not joined yet."""
    open_ones = (state.incidents[name] for name in state.open_incidents)
    return [each for each in open_ones if each.replaces_ranks and each.acted_on and joined(state, each) is None]


def is_answered(attempt: Attempt, raised: SignalRaised) -> bool:
    """Whether a finding is a loss of ranks that were replaced, or are being replaced, since it was found."""
    if raised.signal == FailureClass.STRAGGLER:  # it is found in telemetry, and has an incident of its own
        return False
    return raised.generation < attempt.generation and raised.signal in _LOSSES


def deadline_of(incident: Incident, policy: Policy) -> float:
    """Seconds from the first order, within which all ranks must have joined."""
    playbook, decision = policy.playbooks.get(incident.kind), incident.decision
    if playbook is None or decision is None or not playbook.in_place_rungs:
        return policy.in_place_seconds
    return playbook.ladder[0].deadline_seconds or policy.in_place_seconds


def _next(
    state: State, incident: Incident, attempt: Attempt, ordered: list[Members], now: float, policy: Policy
) -> Event | None:
    decision = incident.decision
    assert decision is not None

    def failed(why: str) -> MembersFailed:
        generation = ordered[-1].generation if ordered else attempt.generation + 1
        return MembersFailed(attempt=attempt.name, generation=generation, why=why, incident=incident.name)

    news = [each for each in state.signals.values() if ordered and _is_news(attempt, each)]
    if (why := next(filter(None, map(_hopeless, news)), None)) is not None:
        return failed(why)
    if not attempt.live:
        return failed(f"the attempt {attempt.outcome}")
    if attempt.stop_why is not None:
        return failed(f"the attempt was stopped: {attempt.stop_why}")
    if not ordered:
        return _order(incident, attempt, Replacement(decision.nodes, decision.ranks))
    deadline = deadline_of(incident, policy)
    if not still_waiting(now, ordered[0].intended_at, deadline):
        return failed(f"not all ranks had joined {deadline:g} s after the first order")
    leaving = {name for each in news if _node_goes(each) for name in each.nodes} | _bad_nodes(state, attempt)
    lost = {int(rank) for each in news for rank in each.evidence.get("lost_ranks", ())}
    leaving &= set(attempt.nodes)
    if not lost and not leaving:
        return None
    if len(ordered) >= MOST_GENERATIONS:
        return failed(f"ranks were lost again after {len(ordered)} orders")
    found = place(state, attempt, lost, leaving, now, policy, unjoined=ordered[-1].new)
    return failed(found) if isinstance(found, str) else _order(incident, attempt, found)


def _order(incident: Incident, attempt: Attempt, found: Replacement) -> MembersIntended:
    return MembersIntended(
        attempt=attempt.name,
        generation=attempt.generation + 1,
        nodes=found.nodes,
        new=found.ranks,
        incident=incident.name,
    )


def _is_news(attempt: Attempt, raised: SignalRaised) -> bool:
    """Whether it was found in the newest generation, and is not of its training: that has not begun."""
    of_loss = raised.signal in _LOSSES or "lost_ranks" in raised.evidence
    of_attempt = raised.attempt == attempt.name and raised.tier is Tier.ACT
    return of_attempt and of_loss and raised.generation == attempt.generation


def _hopeless(raised: SignalRaised) -> str | None:
    """Why a finding ends the replacement."""
    if ExitCode.NO_COMMON_STEP in raised.evidence.get("codes", ()):
        return "the ranks have no common step: the state of some of them is lost"
    if raised.signal not in _LOSSES:
        return f"ranks ended while they were being replaced: {raised.signal}"
    return None


def _node_goes(raised: SignalRaised) -> bool:
    return "lost_ranks" not in raised.evidence


def _bad_nodes(state: State, attempt: Attempt) -> set[str]:
    """Nodes of the attempt that were found bad meanwhile, or that are not held any more."""
    known = {name: state.nodes.get(name) for name in attempt.nodes}
    bad = {name for name, node in known.items() if node is not None and node.verdict is Verdict.BAD}
    return bad | {name for name in attempt.nodes if name not in state.held}
