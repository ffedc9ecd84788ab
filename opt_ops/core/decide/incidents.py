"""From findings to incidents: which findings are one event, what caused it, and whether a drill did."""

from __future__ import annotations

from collections.abc import Mapping

from opt_ops.core.decide.asking import can_wait
from opt_ops.core.decide.capacity import eligible_nodes, final_save_due, nears_limit, outliving_limit
from opt_ops.core.decide.causes import of_drill, suspicions
from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.decide.ends import end_of_training, open_end
from opt_ops.core.decide.members import is_answered, is_rejoining
from opt_ops.core.decide.operator_changes import open_request
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.trouble import earlier_tries
from opt_ops.core.events import Event, IncidentOpened, SignalRaised
from opt_ops.core.failures.causes import Suspicion
from opt_ops.core.failures.classes import FailureClass, cause
from opt_ops.core.memo import memoize_recent
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.in_place import joined
from opt_ops.core.state.model import Allocation, Incident, Node, State
from opt_ops.core.state.queries import leaves_standing, open_proposals
from opt_ops.core.values import PREEMPTED, Action, Driver, Fault, Outcome, Tier, Verdict


def open_incident(state: State, now: float, policy: Policy) -> Event | None:
    """The next incident that the state's findings call for, if any."""
    if state.ended:
        return None
    return (
        _daemon_restart(state, now)
        or _bad_node(state)
        or _signal(state, policy)
        or _ended_attempt(state, now, policy)
        or open_request(state, _name(state), now)
        or _planned_move(state, now, policy)
    )


def _name(state: State) -> str:
    return f"{state.intent.lineage}-i{len(state.incidents):03d}"


def _daemon_restart(state: State, now: float) -> IncidentOpened | None:
    attempt = state.attempt
    if state.blind_seconds is None or attempt is None:
        return None
    if any(i.kind == FailureClass.DAEMON_RESTART and i.opened_epoch == state.epoch for i in state.incidents.values()):
        return None
    attributed = {incident.drill for incident in state.incidents.values()}
    drills = [d for d in state.drills.values() if d.fault is Fault.KILL_DAEMON and d.epoch < state.epoch]
    drill = next((d.name for d in drills if d.name not in attributed), None)
    return IncidentOpened(
        incident=_name(state),
        failure=FailureClass.DAEMON_RESTART,
        cause=f"no daemon ran for {state.blind_seconds:.1f} s; training continued",
        detector="the journal has an earlier daemon process",
        attempt=attempt.name,
        nodes=(),
        step_failed=attempt.last_step,
        onset_step=None,
        at=now - state.blind_seconds,
        evidence={"blind_seconds": state.blind_seconds, "epoch": state.epoch},
        drill=drill,
    )


def _bad_node(state: State) -> IncidentOpened | None:
    attempt = state.attempt
    for node in _bad_nodes(state.held, state.nodes):
        name = node.name
        incidents = (i for i in state.incidents.values() if i.kind == FailureClass.BAD_GPU and name in i.nodes)
        if any(incident.opened_at >= node.allowed_at for incident in incidents):
            continue
        # A GPU that fails takes its ranks along: an attempt that has just died there died of it.
        used = attempt is not None and name in attempt.nodes and (attempt.live or not _has_cause(state, attempt))
        if used and attempt is not None and attempt.live and is_rejoining(state, attempt.name):
            continue  # it leaves in the next generation, and is then one that nothing runs on
        return IncidentOpened(
            incident=_name(state),
            failure=FailureClass.BAD_GPU,
            cause=f"{name}: {node.reason}",
            detector=node.source,
            attempt=attempt.name if used and attempt else None,
            nodes=(name,),
            step_failed=attempt.last_step if used and attempt else None,
            onset_step=None,
            at=node.at,
            evidence=node.evidence,
            drill=node.drill,
        )
    return None


@memoize_recent
def _bad_nodes(held: Mapping[str, Allocation], nodes: Mapping[str, Node]) -> list[Node]:
    known = (node for name in held if (node := nodes.get(name)) is not None)
    return [node for node in known if node.verdict is Verdict.BAD and not node.excluded_by]


def _signal(state: State, policy: Policy) -> IncidentOpened | None:
    attempt = state.attempt
    if attempt is None or _has_cause(state, attempt):
        return None
    asks = bool(open_proposals(state))  # about what training survives; what stops it goes first
    raised = next(
        (
            signal
            for signal in state.signals.values()
            if signal.tier is Tier.ACT
            and signal.attempt == attempt.name
            and not is_answered(attempt, signal)
            and not _has_incident(state, attempt, signal)
            and not (asks and can_wait(signal.signal, policy))
        ),
        None,
    )
    if raised is None:
        return None
    return IncidentOpened(
        incident=_name(state),
        failure=raised.signal,
        cause=cause(raised),
        detector=raised.rule,
        attempt=attempt.name,
        nodes=raised.nodes,
        step_failed=raised.step if raised.step is not None else attempt.last_step,
        onset_step=raised.onset_step,
        at=raised.at,
        evidence=raised.evidence,
        signal=raised.key,
        margin_steps=raised.margin_steps,
        drill=(drill := drill_behind(state, raised)),
        causes=of_drill(state, drill) if drill is not None else causes_of(state, raised, policy),
    )


def causes_of(
    state: State, raised: SignalRaised, policy: Policy, probes: Mapping[str, bool] | None = None
) -> tuple[Suspicion, ...]:
    """What may be behind a finding: by its telemetry, by what was tried before, and by whether probes spiked."""
    playbook = policy.playbooks.get(raised.signal)
    here = raised.onset_step if raised.onset_step is not None else raised.step or 0
    tries = earlier_tries(state, here, playbook.budget.settle_steps if playbook else None)
    return suspicions(state, raised, tries, probes)


def _has_incident(state: State, attempt: Attempt, raised: SignalRaised) -> bool:
    """Whether an incident already stands for the finding.

    One that was not acted on stands for it while an operator drives, and if the attempt has continued since. One whose
    only action was to notify on-call stands for it always.
    """
    survived = (attempt.last_step or 0) > (raised.step or 0)
    return any(
        incident.signal == raised.key
        and (not _not_acted_on(incident) or _notify_only(incident) or state.driver is not Driver.DAEMON or survived)
        for incident in state.incidents.values()
    )


def _notify_only(incident: Incident) -> bool:
    return incident.decision is not None and incident.decision.action is Action.NOTIFY


def _ended_attempt(state: State, now: float, policy: Policy) -> IncidentOpened | None:
    """An attempt that ended and that no signal explains: it needs an incident, too."""
    attempt = state.attempt
    if attempt is None or attempt.live or _has_cause(state, attempt) or state.driver is Driver.SHADOW:
        return None
    if state.driver is Driver.OPERATOR and any(i.attempt == attempt.name for i in state.incidents.values()):
        return None  # reported once; it is decided when the daemon drives again
    if end_of_training(state, now, policy) is not None:
        return open_end(state, _name(state), now, policy)
    if attempt.leave_at is not None and attempt.outcome in (Outcome.STOPPED, Outcome.LOST):
        return None  # it left as it was asked to
    return IncidentOpened(
        incident=_name(state),
        failure=FailureClass.PROCESS_DEATH,
        cause=f"attempt {attempt.name} {attempt.outcome} at step {attempt.last_step}; no finding says why",
        detector="an attempt ended before the last step",
        attempt=attempt.name,
        nodes=(),
        step_failed=attempt.last_step,
        onset_step=None,
        at=attempt.ended_at or now,
    )


def _planned_move(state: State, now: float, policy: Policy) -> IncidentOpened | None:
    """A healthy attempt must move: its allocation ends soon, or there are nodes for a larger one."""
    attempt = state.attempt
    if attempt is None or not attempt.live or not attempt.nodes or _has_cause(state, attempt):
        return None
    through = {state.held[node].name: state.held[node] for node in attempt.nodes if node in state.held}
    ending = next((a for a in through.values() if nears_limit(a, now, policy)), None)
    if (
        ending is not None
        and ending.ends_at is not None
        and now <= ending.ends_at  # past it, the scheduler will say what has become of the job
        and not _already_reported(state, attempt, _why_it_ends(ending)[0])
    ):
        others = outliving_limit(state, eligible_nodes(state, policy, now), now, policy)
        if len(others) >= len(attempt.nodes):
            cause = f"allocation {ending.name} ends in {ending.ends_at - now:.0f} s; {len(others)} other nodes are held"
            return _open_move(state, attempt, *_why_it_ends(ending), cause, now)
        if final_save_due(ending, now, policy) and attempt.first_step is not None:  # else there is nothing to save
            cause = f"allocation {ending.name} ends in {ending.ends_at - now:.0f} s, and there are no other nodes yet"
            return _open_move(state, attempt, *_why_it_ends(ending), cause, now)
    if state.size > len(attempt.nodes) and not _already_reported(state, attempt, FailureClass.NODES_RETURNED):
        cause = f"{state.size} nodes are fit, the attempt runs on {len(attempt.nodes)}"
        return _open_move(state, attempt, FailureClass.NODES_RETURNED, "more nodes are fit than are in use", cause, now)
    return None


def _already_reported(state: State, attempt: Attempt, failure: FailureClass) -> bool:
    """Whether this was reported for the attempt and nothing is done: an operator drives, or on-call is notified."""
    incidents = (i for i in state.incidents.values() if i.attempt == attempt.name and i.kind == failure)
    return any(_not_acted_on(i) and (_notify_only(i) or state.driver is not Driver.DAEMON) for i in incidents)


def _why_it_ends(allocation: Allocation) -> tuple[FailureClass, str]:
    """The failure class, and who says so."""
    if allocation.reason == PREEMPTED:
        return FailureClass.PREEMPTION, "the scheduler takes the nodes for a job of higher priority"
    return FailureClass.TIME_LIMIT, "the scheduler's time limit"


def _open_move(
    state: State, attempt: Attempt, failure: FailureClass, detector: str, cause: str, now: float
) -> IncidentOpened:
    return IncidentOpened(
        incident=_name(state),
        failure=failure,
        cause=cause,
        detector=detector,
        attempt=attempt.name,
        nodes=(),
        step_failed=attempt.last_step,
        onset_step=None,
        at=now,
    )


def _has_cause(state: State, attempt: Attempt) -> bool:
    """Whether an incident already explains the end of this attempt: later findings are its consequences."""
    return any(
        incident.attempt == attempt.name
        and incident.kind != FailureClass.DAEMON_RESTART
        and (not _not_acted_on(incident) or leaves_standing(state, incident))
        and not _waits_beside_training(incident)
        and not (incident.replaces_ranks and joined(state, incident) is not None)
        for incident in state.incidents.values()
    )


def _waits_beside_training(incident: Incident) -> bool:
    """Whether a person is asked about it, and training goes on meanwhile: it explains no end."""
    proposal = incident.proposal
    return incident.decision is None and proposal is not None and proposal.made.trains


def _not_acted_on(incident: Incident) -> bool:
    """Whether it was closed without an action: later findings about the attempt need an incident of their own."""
    return incident.closed_at is not None and not incident.acted_on
