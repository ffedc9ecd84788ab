"""`decide(state, now, policy) -> event`: what to do next. No I/O, no clock, no random number.

It returns one decision or intent, not yet journaled. The supervisor journals it, folds it, and asks again until nothing
is left to decide. Then it executes the open intents. Each rule below is one reason to act; the first rule that returns
an event wins. There is one event at a time: every decision knows all earlier ones, and a daemon that is killed between
two of them finds the second one still undecided.
"""

from __future__ import annotations

from collections.abc import Callable

from opt_ops.core.decide.afterthoughts import add_afterthought
from opt_ops.core.decide.alerts import alert
from opt_ops.core.decide.capacity import allocate, launch, release, resize
from opt_ops.core.decide.ends import completed
from opt_ops.core.decide.evaluation import evaluate
from opt_ops.core.decide.incidents import open_incident
from opt_ops.core.decide.members import follow_members
from opt_ops.core.decide.next_run import settings_after
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.probes import intend_probes, judge_probes
from opt_ops.core.decide.proof import prove
from opt_ops.core.decide.proof_in_place import prove_in_place
from opt_ops.core.decide.recovery import decide_recovery
from opt_ops.core.decide.suspects import is_condemned
from opt_ops.core.events import (
    CheckpointRefused,
    DrainIntended,
    Event,
    LeaveIntended,
    LineageCancelled,
    LineageCompleted,
    LineageHalted,
    LineagePaused,
    LineageStarted,
    NodeExcluded,
    RunPlanned,
    StacksIntended,
    StopIntended,
)
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.names import run_name
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, Node, State
from opt_ops.core.state.queries import newest_good, under_examination, waiting_for_attempt
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from opt_ops.core.waiting import still_waiting


def decide(state: State, now: float, policy: Policy) -> Event | None:
    """The next decision or intent; None when there is nothing to do at `now` (seconds since the epoch)."""
    if state.lineage is None:
        return None
    for rule in RULES:
        if (event := rule(state, now, policy)) is not None:
            return event
    return None


def cancel(state: State, now: float, policy: Policy) -> Event | None:
    """Cancel the lineage: an operator asked for it."""
    if state.stop is None or state.status in (Status.CANCELLED, Status.COMPLETED):
        return None
    return LineageCancelled(request=state.stop.request, why=f"{state.stop.author}: {state.stop.reason}")


def complete(state: State, now: float, policy: Policy) -> Event | None:
    """Complete the lineage: every step is trained, the last checkpoint has a verdict, and nothing else is open."""
    done = None if state.ended else completed(state, now, policy)
    return LineageCompleted(step=done[0], why=done[1]) if done is not None else None


def ask_stacks(state: State, now: float, policy: Policy) -> Event | None:
    """Ask the ranks of a hung attempt for their stacks, before anything is killed."""
    attempt = state.attempt
    for incident in state.incidents.values():
        hung = incident.kind == FailureClass.HANG and incident.decision is None and incident.stacks_at is None
        if hung and attempt is not None and attempt.live and attempt.nodes and not state.ended:
            return StacksIntended(attempt=attempt.name, incident=incident.name)
    return None


def refuse_checkpoint(state: State, now: float, policy: Policy) -> Event | None:
    """Refuse the checkpoint that a decision names as bad, and its twins of the same step: nothing begins there."""
    for incident in (state.incidents[name] for name in state.open_incidents):
        bad = incident.decision.refuses if incident.decision and incident.acted_on else None
        if bad is None or incident.answered:
            continue
        for known in state.checkpoints.values():
            twin = (known.checkpoint.run, known.checkpoint.step) == (bad.run, bad.step)
            if twin and known.good:
                why = f"{incident.name}: training that began here did not continue the loss that was reached"
                return CheckpointRefused(checkpoint=known.checkpoint, why=why)
    return None


def halt(state: State, now: float, policy: Policy) -> Event | None:
    """Halt the lineage: a playbook ends here, or an action did not take effect."""
    if state.ended:
        return None
    for incident in state.incidents.values():
        decision = incident.decision
        if decision is None or decision.advice or incident.answered:
            continue
        if decision.action is Action.HALT:
            return LineageHalted(why=f"{incident.name} {incident.cause}; {decision.why}", incident=incident.name)
        if incident.proven is False:
            why = f"{incident.name}: {decision.action} did not take effect: {incident.proof.get('mismatch')}"
            return LineageHalted(why=why, incident=incident.name)
    return None


def pause(state: State, now: float, policy: Policy) -> Event | None:
    """Pause the lineage: an operator asked for it, and nothing runs any more."""
    asked = state.paused
    if asked is None or state.ended or state.status is Status.PAUSED or (state.attempt and state.attempt.live):
        return None
    return LineagePaused(why=f"{asked.author}: {asked.reason}")


def exclude_nodes(state: State, now: float, policy: Policy) -> Event | None:
    """Exclude the nodes that a decision names, within the hourly limit: no attempt starts there any more."""
    for incident in state.incidents.values():
        for name in incident.decision.exclude if incident.decision and incident.acted_on else ():
            node = state.nodes.get(name) or Node(name=name)
            if node.excluded_by is not None or node.allowed_at >= (incident.decided_at or 0.0) or incident.answered:
                continue
            if incident.drill is None and _cordoned(state, now) >= policy.limits.cordon_per_hour:
                continue
            return NodeExcluded(node=name, incident=incident.name, reason=f"{incident.kind}: {node.reason}")
    return None


def _cordoned(state: State, now: float) -> int:
    """How many nodes were excluded within the last hour, without those of drills and of operators."""
    recent = [node for node in state.nodes.values() if node.excluded_by and now - node.excluded_at < 3600]
    by = [state.incidents.get(node.excluded_by or "") for node in recent]
    return sum(incident is not None and incident.drill is None for incident in by)


def drain_nodes(state: State, now: float, policy: Policy) -> Event | None:
    """Drain excluded nodes that are known to be bad, so that no other user of the cluster gets them."""
    for node in state.nodes.values():
        if node.excluded_by is not None and node.drain is None and is_condemned(state, node):
            return DrainIntended(node=node.name, incident=node.excluded_by, reason=node.reason)
    return None


def leave_attempt(state: State, now: float, policy: Policy) -> Event | None:
    """Let a healthy attempt save and leave: for a pause, other settings, more nodes, or before a time limit."""
    attempt = state.attempt
    if attempt is None or not attempt.live or state.ended or attempt.leave_at is not None or attempt.stop_at:
        return None
    if attempt.rejoining is not None:
        return None  # it cannot save before all its ranks have joined; there is a deadline for that
    if state.paused is not None:
        return LeaveIntended(attempt=attempt.name, why=f"paused by {state.paused.author}", incident=None)
    incident = next((i for i in _ending(state) if i.decision and i.decision.save_first), None)
    if incident is None:
        return None
    return LeaveIntended(attempt=attempt.name, why=incident.cause, incident=incident.name)


def stop_attempt(state: State, now: float, policy: Policy) -> Event | None:
    """Stop the attempt: a recovery was decided, it has saved and may leave, or the lineage has ended."""
    attempt = state.attempt
    if attempt is None or not attempt.live or attempt.stop_why is not None:
        return None
    if state.ended:
        return StopIntended(attempt=attempt.name, why=f"the lineage is {state.status}: {state.why}", incident=None)
    for incident in _ending(state):
        if incident.decision and not incident.decision.save_first:
            return StopIntended(attempt=attempt.name, why=incident.cause, incident=incident.name)
    if (done := _found_complete(state, attempt)) is not None:
        return StopIntended(attempt=attempt.name, why=done, incident=None)
    left_at = attempt.leave_at
    if left_at is None:
        return None
    waits = still_waiting(now, left_at, policy.capacity.leave_seconds) and attempt.first_step is not None
    if not waits or _saved(state, attempt):
        incident = next(iter(_ending(state)), None)
        why = attempt.leave_why or ""
        return StopIntended(attempt=attempt.name, why=why, incident=incident.name if incident else None)
    return None


def _found_complete(state: State, attempt: Attempt) -> str | None:
    """Why the ranks that are left have nothing to do any more; None: nobody has decided so."""
    decisions = (i.decision for i in state.incidents.values() if i.attempt == attempt.name or i.attempt is None)
    return next((each.why for each in decisions if each is not None and each.action is Action.COMPLETE), None)


def _saved(state: State, attempt: Attempt) -> bool:
    """Whether a durable checkpoint holds every step that was journaled when the attempt was asked to leave."""
    durable = (each for each in state.checkpoints.values() if each.good and not each.checkpoint.nodes)
    return any(k.checkpoint.run == attempt.run and k.checkpoint.step >= (attempt.leave_step or 0) for k in durable)


def _ending(state: State) -> list[Incident]:
    """The incidents whose recovery needs the newest attempt to end."""
    attempt = state.attempt
    return [i for i in waiting_for_attempt(state) if attempt is not None and i.next_attempt != attempt.name]


def plan_run(state: State, now: float, policy: Policy) -> Event | None:
    """Plan the first run, or the next one after a rollback or a change of settings."""
    if state.ended:
        return None
    if state.run is None:
        return _first_run(state.intent)
    planned = {run.incident for run in state.runs.values()}
    for incident in waiting_for_attempt(state):
        decision = incident.decision
        if decision is None or decision.action is Action.RESTART or incident.name in planned:
            continue
        checkpoint = decision.checkpoint
        if decision.action is Action.RECONFIGURE:
            live = state.attempt is not None and state.attempt.live
            if live or under_examination(state, state.run.name, now, policy.examine_seconds):
                continue  # it goes on from where the attempt has come to
            known = newest_good(state, state.run.name)
            checkpoint = known.checkpoint if known else state.run.checkpoint
        after = settings_after(state, incident, decision, checkpoint.step if checkpoint else 0)
        return RunPlanned(
            run=run_name(state.intent.lineage, len(state.runs)),
            parent=state.run.name,
            cause=incident.cause,
            incident=incident.name,
            checkpoint=checkpoint,
            lr_factors=after.lr_factors,
            settings=after.settings,
            skips=after.skips,
            data=after.data,
        )
    return None


def _first_run(asked: LineageStarted) -> RunPlanned:
    """The first run of a lineage: from scratch, or from the checkpoint of the lineage that it is a fork of."""
    parent = asked.parent
    return RunPlanned(
        run=run_name(asked.lineage, 0),
        parent=parent.run if parent else None,
        cause=f"fork of {parent.run} at step {parent.step}" if parent else "start",
        incident=None,
        checkpoint=parent.saved if parent else None,
        lr_factors=asked.lr_factors,
        skips=asked.skips,
        data=asked.data_since,
    )


def close_incident(state: State, now: float, policy: Policy) -> Event | None:
    """Close an incident once telemetry shows whether the action took effect."""
    for incident in state.incidents.values():
        if incident.closed_at is None and incident.decision is not None:
            in_place = incident.acted_on and incident.replaces_ranks
            proof = prove_in_place if in_place and state.status is not Status.COMPLETED else prove
            closed = proof(state, incident, policy)
            if closed is not None:
                return closed
    return None


RULES: tuple[Callable[[State, float, Policy], Event | None], ...] = (
    cancel,
    open_incident,
    ask_stacks,
    intend_probes,
    judge_probes,
    decide_recovery,
    follow_members,
    complete,
    halt,
    pause,
    refuse_checkpoint,
    exclude_nodes,
    drain_nodes,
    leave_attempt,
    stop_attempt,
    plan_run,
    resize,
    release,
    allocate,
    launch,
    close_incident,
    add_afterthought,
    alert,
    evaluate,
)
