"""What findings, incidents, decisions and alerts do to the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.state.model import Afterthought, AlertState, Incident, Proposal, State
from opt_ops.core.state.update import (
    with_incident,
    with_item,
    with_new_incident,
    with_node,
    with_request_handled,
)
from opt_ops.core.values import Verdict


def _signal_raised(state: State, event: e.SignalRaised, _: e.Entry) -> State:
    return replace(state, signals=with_item(state.signals, event.key, event))


def _node_judged(state: State, event: e.NodeJudged, _: e.Entry) -> State:
    known = state.nodes.get(event.node)
    return with_node(
        state,
        event.node,
        host=event.host,
        verdict=event.verdict,
        reason=event.reason,
        source=event.source,
        at=event.at,
        evidence=event.evidence,
        drill=event.drill,
        gpus=event.gpus or (known.gpus if known else ()),
    )


def _incident_opened(state: State, event: e.IncidentOpened, entry: e.Entry) -> State:
    incident = Incident(
        name=event.incident,
        kind=event.failure,
        cause=event.cause,
        detector=event.detector,
        attempt=event.attempt,
        nodes=event.nodes,
        step_failed=event.step_failed,
        onset_step=event.onset_step,
        at=event.at,
        opened_at=entry.ts,
        opened_epoch=entry.epoch,
        evidence=event.evidence,
        drill=event.drill,
        signal=event.signal,
        margin_steps=event.margin_steps,
        causes=event.causes,
    )
    return with_new_incident(state, incident)


def _stacks_intended(state: State, event: e.StacksIntended, entry: e.Entry) -> State:
    return with_incident(state, event.incident, stacks_at=entry.ts)


def _stacks_taken(state: State, event: e.StacksTaken, _: e.Entry) -> State:
    nodes = state.incidents[event.incident].nodes or event.nodes
    return with_incident(state, event.incident, stacks=event, nodes=nodes)


def _probes_intended(state: State, event: e.ProbesIntended, _: e.Entry) -> State:
    return with_incident(state, event.incident, probes=event)


def _probe_ended(state: State, event: e.ProbeEnded, _: e.Entry) -> State:
    return with_incident(state, event.incident, probe_ends=(*state.incidents[event.incident].probe_ends, event))


def _probes_judged(state: State, event: e.ProbesJudged, _: e.Entry) -> State:
    return with_incident(state, event.incident, probes_judged=True, causes=event.causes)


def _proposal_made(state: State, event: e.ProposalMade, entry: e.Entry) -> State:
    made = Proposal(made=event, at=entry.ts)
    return with_incident(state, event.incident, proposals=(*state.incidents[event.incident].proposals, made))


def _proposal_answered(state: State, event: e.ProposalAnswered, entry: e.Entry) -> State:
    """The first answer holds."""
    known = state.incidents[event.incident].proposals
    proposals = tuple(
        replace(each, answer=event, answered_at=entry.ts)
        if each.name == event.proposal and each.answer is None
        else each
        for each in known
    )
    if event.request is not None:
        state = with_request_handled(state, event.request)
    return with_incident(state, event.incident, proposals=proposals)


def _recovery_decided(state: State, event: e.RecoveryDecided, entry: e.Entry) -> State:
    return with_incident(state, event.incident, decision=event, decided_at=entry.ts)


def _node_excluded(state: State, event: e.NodeExcluded, entry: e.Entry) -> State:
    state = with_node(state, event.node, excluded_by=event.incident, excluded_at=entry.ts)
    if event.request is not None:
        state = with_request_handled(state, event.request)
    part = state.nodes[event.node].evidence.get("uuid")
    if part is None or state.nodes[event.node].verdict is not Verdict.BAD:
        return state
    # A bad GPU may come back in another node, or in this one under another name.
    return replace(state, bad_parts=with_item(state.bad_parts, str(part), event.node))


def _drain_intended(state: State, event: e.DrainIntended, _: e.Entry) -> State:
    return with_node(state, event.node, drain="intended")


def _node_drained(state: State, event: e.NodeDrained, _: e.Entry) -> State:
    return with_node(state, event.node, drain="done" if event.done else "refused")


def _incident_closed(state: State, event: e.IncidentClosed, entry: e.Entry) -> State:
    return with_incident(
        state,
        event.incident,
        closed_at=entry.ts,
        proven=event.proven,
        proof=event.proof,
        step_resumed=event.step_resumed,
        steps_lost=event.steps_lost,
        seconds_down=event.seconds_down,
    )


def _afterthought_added(state: State, event: e.AfterthoughtAdded, entry: e.Entry) -> State:
    added = Afterthought(topic=event.topic, text=event.text, at=entry.ts)
    return with_incident(state, event.incident, afterthoughts=(*state.incidents[event.incident].afterthoughts, added))


def _lineage_completed(state: State, event: e.LineageCompleted, _: e.Entry) -> State:
    return replace(state, why=event.why)


def _lineage_halted(state: State, event: e.LineageHalted, _: e.Entry) -> State:
    return replace(state, why=event.why)


def _lineage_cancelled(state: State, event: e.LineageCancelled, _: e.Entry) -> State:
    return replace(state, why=event.why)


def _alert_intended(state: State, event: e.AlertIntended, entry: e.Entry) -> State:
    return replace(state, alerts=with_item(state.alerts, event.alert, AlertState(told=event, at=entry.ts)))


def _alert_settled(state: State, event: e.AlertSettled, _: e.Entry) -> State:
    alert = replace(state.alerts[event.alert], delivered=event.delivered)
    return replace(state, alerts=with_item(state.alerts, event.alert, alert))


FOLDS: Mapping[type[e.Event], Callable[[State, Any, e.Entry], State]] = {
    e.SignalRaised: _signal_raised,
    e.NodeJudged: _node_judged,
    e.IncidentOpened: _incident_opened,
    e.StacksIntended: _stacks_intended,
    e.StacksTaken: _stacks_taken,
    e.ProbesIntended: _probes_intended,
    e.ProbeEnded: _probe_ended,
    e.ProbesJudged: _probes_judged,
    e.ProposalMade: _proposal_made,
    e.ProposalAnswered: _proposal_answered,
    e.RecoveryDecided: _recovery_decided,
    e.NodeExcluded: _node_excluded,
    e.DrainIntended: _drain_intended,
    e.NodeDrained: _node_drained,
    e.IncidentClosed: _incident_closed,
    e.AfterthoughtAdded: _afterthought_added,
    e.LineageCompleted: _lineage_completed,
    e.LineageHalted: _lineage_halted,
    e.LineageCancelled: _lineage_cancelled,
    e.AlertIntended: _alert_intended,
    e.AlertSettled: _alert_settled,
}
