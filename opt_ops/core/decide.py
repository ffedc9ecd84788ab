"""`decide(state, now, policy) -> event`: what to do next. No I/O, no clock, no random number.

It returns one decision or intent, not yet journaled. The supervisor journals it, folds, and asks again until there is
nothing left to decide; then it carries out the open intents. Each rule below is one reason to act, and the first
that has something to say is heard. One event at a time, so that every decision knows all earlier ones, and so that
a daemon killed between two of them finds the second still to be decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

from opt_ops.core.events import (
    AllocationIntended,
    AttemptIntended,
    DrainIntended,
    Event,
    LineageCancelled,
    LineageCompleted,
    LineageHalted,
    NodeExcluded,
    RecoveryDecided,
    ReleaseIntended,
    RunPlanned,
    StopIntended,
)
from opt_ops.core.incidents import open_incident
from opt_ops.core.policy import Policy, choose_rung, newest_good, rollback_point, under_examination
from opt_ops.core.proof import prove
from opt_ops.core.run import Incident, Node, State, Status, attempt_name, run_name
from opt_ops.core.values import Action, AllocationStatus, LrFactor, Outcome, Shape, Verdict


def decide(state: State, now: float, policy: Policy) -> Event | None:
    """The next decision or intent; None when there is nothing to do at `now` (seconds since the epoch)."""
    if state.lineage is None:
        return None
    for rule in RULES:
        if (event := rule(state, now, policy)) is not None:
            return event
    return None


def cancel(state: State, now: float, policy: Policy) -> Event | None:
    """An operator wants it stopped."""
    if state.stop is None or state.status in (Status.CANCELLED, Status.COMPLETED):
        return None
    return LineageCancelled(request=state.stop.request, why=f"{state.stop.author}: {state.stop.reason}")


def complete(state: State, now: float, policy: Policy) -> Event | None:
    """Every rank left with code 0, at the schedule's last step."""
    attempt = state.attempt
    if state.ended or attempt is None or attempt.outcome is not Outcome.COMPLETED or attempt.steps is None:
        return None
    if attempt.last_step is None or attempt.last_step < attempt.steps:
        return None
    return LineageCompleted(step=attempt.last_step)


def decide_recovery(state: State, now: float, policy: Policy) -> Event | None:
    """An open incident has no decision yet: ask its playbook."""
    incident = next((i for i in state.incidents.values() if i.decision is None), None)
    if incident is None or state.ended:
        return None
    playbook = policy.playbooks.get(incident.kind)
    if playbook is None:
        why = f"no playbook is triggered by {incident.kind}"
        return RecoveryDecided(incident=incident.name, playbook="none", version=0, rung=0, action=Action.HALT, why=why)
    number, rung, why = choose_rung(state, incident, playbook, now)
    decided = RecoveryDecided(
        incident=incident.name,
        playbook=playbook.name,
        version=playbook.version,
        rung=number,
        action=rung.action if rung else Action.HALT,
        why=why,
        exclude=incident.nodes if rung and rung.exclude else (),
    )
    if rung is None or rung.action is Action.HALT:
        return decided
    if rung.action is Action.RESTART and not _touches_live_work(state, incident):
        return replace(decided, action=Action.EXCLUDE, why=f"no rank runs there, so nothing is restarted; {why}")
    if rung.action is Action.ROLLBACK:
        onset = incident.onset_step or incident.step_failed or 0
        assert incident.attempt is not None
        known, where = rollback_point(state, state.attempts[incident.attempt].run, onset, rung.margin_steps)
        checkpoint = known.checkpoint if known else None
        return replace(decided, checkpoint=checkpoint, lr_factor=rung.lr_factor, why=f"{where}; {why}")
    return decided


def halt(state: State, now: float, policy: Policy) -> Event | None:
    """A playbook ends here, or an action did not take effect: training must not go on as if it had."""
    if state.ended:
        return None
    for incident in state.incidents.values():
        decision = incident.decision
        if decision is not None and decision.action is Action.HALT:
            return LineageHalted(why=decision.why, incident=incident.name)
        if decision is not None and incident.proven is False:
            why = f"{incident.name}: {decision.action} did not take effect: {incident.proof.get('mismatch')}"
            return LineageHalted(why=why, incident=incident.name)
    return None


def exclude_nodes(state: State, now: float, policy: Policy) -> Event | None:
    """A decision takes nodes out: no attempt starts there any more."""
    for incident in state.incidents.values():
        for name in incident.decision.exclude if incident.decision else ():
            node = state.nodes.get(name, Node(name=name))
            if node.excluded_by is None:
                return NodeExcluded(node=name, incident=incident.name, reason=f"{incident.kind}: {node.reason}")
    return None


def drain_nodes(state: State, now: float, policy: Policy) -> Event | None:
    """Whoever else uses the cluster should not get an excluded node either."""
    for node in state.nodes.values():
        if node.excluded_by is not None and node.drain is None:
            return DrainIntended(node=node.name, incident=node.excluded_by, reason=node.reason)
    return None


def stop_attempt(state: State, now: float, policy: Policy) -> Event | None:
    """The attempt must not go on: a recovery was decided, or the lineage has ended."""
    attempt = state.attempt
    if attempt is None or not attempt.live or attempt.stop_why is not None:
        return None
    if state.ended:
        return StopIntended(attempt=attempt.name, why=f"the lineage is {state.status}: {state.why}", incident=None)
    recovering = next((i for i in waiting_for_attempt(state) if i.next_attempt != attempt.name), None)
    if recovering is None:
        return None
    return StopIntended(attempt=attempt.name, why=recovering.cause, incident=recovering.name)


def plan_run(state: State, now: float, policy: Policy) -> Event | None:
    """The first run, or the next one after a rollback."""
    assert state.lineage is not None
    if state.ended:
        return None
    if state.run is None:
        name = run_name(state.lineage.lineage, 0)
        return RunPlanned(run=name, parent=None, cause="start", incident=None, checkpoint=None, lr_factors=())
    planned = {run.incident for run in state.runs.values()}
    for incident in waiting_for_attempt(state):
        decision = incident.decision
        if decision is None or decision.action is not Action.ROLLBACK or incident.name in planned:
            continue
        factors = state.run.lr_factors
        if decision.lr_factor is not None:
            step = decision.checkpoint.step if decision.checkpoint else 0
            factors = (*factors, LrFactor(step=step, factor=decision.lr_factor))
        return RunPlanned(
            run=run_name(state.lineage.lineage, len(state.runs)),
            parent=state.run.name,
            cause=incident.cause,
            incident=incident.name,
            checkpoint=decision.checkpoint,
            lr_factors=factors,
        )
    return None


def release(state: State, now: float, policy: Policy) -> Event | None:
    """Give the nodes back: the lineage has ended, too few of them are fit, or only spares keep us in the queue."""
    allocation, attempt = state.allocation, state.attempt
    if allocation is None or not allocation.live or allocation.release_at or (attempt and attempt.live):
        return None
    if state.ended:
        return ReleaseIntended(allocation=allocation.name, why=f"the lineage is {state.status}")
    wanted = _shape(state).nodes
    waited = now - max(allocation.since, attempt.ended_at or 0 if attempt else 0)
    if allocation.status is AllocationStatus.QUEUED:
        only_spares = allocation.job is not None and allocation.wanted > wanted
        if only_spares and waited > policy.spare_seconds:
            why = f"in the queue for {waited:.0f} s: {wanted} nodes without spares may be had sooner"
            return ReleaseIntended(allocation=allocation.name, why=why)
        return None
    fit = len(eligible_nodes(state, policy))
    all_heard = all((node := state.nodes.get(name)) and node.reason != "silent" for name in allocation.nodes)
    patience = policy.unfit_seconds if all_heard else policy.preflight_seconds
    if fit < wanted and waited > patience:
        return ReleaseIntended(allocation=allocation.name, why=f"{fit} of {wanted} nodes fit after {waited:.0f} s")
    return None


def allocate(state: State, now: float, policy: Policy) -> Event | None:
    """No nodes are held: ask for some, a few times with a pause, then call a human."""
    allocation = state.allocation
    if state.ended or (allocation is not None and allocation.live) or (state.attempt and state.attempt.live):
        return None
    fruitless = list(takewhile(lambda each: not each.ran, reversed(list(state.allocations.values()))))
    refused = [each for each in fruitless if each.failed is not None]
    if len(refused) >= policy.submit_tries:
        return LineageHalted(why=f"no nodes after {len(refused)} tries: {refused[0].failed}", incident=None)
    if refused and now - refused[0].since < policy.submit_wait_seconds:
        return None
    assert state.lineage is not None
    excluded = tuple(sorted(name for name, node in state.nodes.items() if node.excluded_by is not None))
    shape = _shape(state)
    spares = 0 if fruitless else shape.spares  # training without spares is better than not training
    name = f"{state.lineage.lineage}-n{len(state.allocations)}"
    return AllocationIntended(allocation=name, nodes=shape.nodes + spares, exclude=excluded)


def launch(state: State, now: float, policy: Policy) -> Event | None:
    """Nodes are held and nothing runs: start the newest run's next attempt."""
    run, allocation = state.run, state.allocation
    if state.ended or run is None or allocation is None or allocation.release_at:
        return None
    if (state.attempt and state.attempt.live) or allocation.status is not AllocationStatus.RUNNING:
        return None
    if under_examination(state, run.name, now - policy.examine_seconds):
        return None
    shape = _shape(state)
    nodes = eligible_nodes(state, policy)[: shape.nodes]
    joining = any(name not in state.nodes for name in allocation.nodes)
    if len(nodes) < shape.nodes or (joining and now - allocation.since < policy.join_seconds):
        return None
    number = sum(attempt.run == run.name for attempt in state.attempts.values())
    known = newest_good(state, run.name)
    incident = next(iter(waiting_for_attempt(state)), None)
    return AttemptIntended(
        attempt=attempt_name(run.name, number),
        run=run.name,
        nodes=tuple(nodes),
        ranks_per_node=shape.ranks_per_node,
        checkpoint=known.checkpoint if known else run.checkpoint,
        incident=incident.name if incident else None,
    )


def close_incident(state: State, now: float, policy: Policy) -> Event | None:
    """Telemetry shows whether the action took effect."""
    for incident in state.incidents.values():
        if incident.closed_at is None and incident.decision is not None:
            closed = prove(state, incident, policy)
            if closed is not None:
                return closed
    return None


RULES: tuple[Callable[[State, float, Policy], Event | None], ...] = (
    cancel,
    complete,
    open_incident,
    decide_recovery,
    halt,
    exclude_nodes,
    drain_nodes,
    stop_attempt,
    plan_run,
    release,
    allocate,
    launch,
    close_incident,
)


def eligible_nodes(state: State, policy: Policy) -> list[str]:
    """The held nodes on which an attempt may start: heard of, not excluded, not suspect, and not blind about GPUs."""
    allocation = state.allocation
    return [
        name
        for name in (allocation.nodes if allocation else ())
        if (node := state.nodes.get(name)) is not None
        and node.excluded_by is None
        and (node.verdict is Verdict.HEALTHY or _blind_but_without_gpus(node, policy))
    ]


def waiting_for_attempt(state: State) -> list[Incident]:
    """Open incidents whose recovery is an attempt that is not proven yet."""
    return [
        incident
        for incident in state.incidents.values()
        if incident.closed_at is None
        and incident.decision is not None
        and incident.decision.action in (Action.RESTART, Action.ROLLBACK)
    ]


def _blind_but_without_gpus(node: Node, policy: Policy) -> bool:
    return policy.expected_gpus == 0 and node.verdict is Verdict.UNKNOWN and node.reason.startswith("nvml_")


def _touches_live_work(state: State, incident: Incident) -> bool:
    """Whether the newest attempt is hit: it is the incident's own, or runs on one of its nodes."""
    attempt = state.attempt
    if attempt is None:
        return False
    return attempt.name == incident.attempt or (attempt.live and not set(attempt.nodes).isdisjoint(incident.nodes))


def _shape(state: State) -> Shape:
    assert state.lineage is not None
    return state.lineage.shape
