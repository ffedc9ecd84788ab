"""From findings to incidents: which findings are one event, what caused it, and whether a drill did."""

from __future__ import annotations

import signal as signals

from opt_ops.core.events import Event, IncidentOpened, SignalRaised
from opt_ops.core.policy import Policy
from opt_ops.core.run import Attempt, Drill, State
from opt_ops.core.values import Fault, Tier, Verdict


def open_incident(state: State, now: float, policy: Policy) -> Event | None:
    """The next incident that the state's findings call for, if any."""
    if state.ended:
        return None
    return _daemon_restart(state, now) or _bad_node(state) or _signal(state) or _ended_attempt(state, now)


def _name(state: State) -> str:
    assert state.lineage is not None
    return f"{state.lineage.lineage}-i{len(state.incidents):03d}"


def _daemon_restart(state: State, now: float) -> IncidentOpened | None:
    attempt = state.attempt
    if state.blind_seconds is None or attempt is None:
        return None
    if any(i.kind == "daemon_restart" and i.opened_epoch == state.epoch for i in state.incidents.values()):
        return None
    attributed = {incident.drill for incident in state.incidents.values()}
    drills = [d for d in state.drills.values() if d.fault is Fault.KILL_DAEMON and d.epoch < state.epoch]
    drill = next((d.name for d in drills if d.name not in attributed), None)
    return IncidentOpened(
        incident=_name(state),
        failure="daemon_restart",
        cause=f"the daemon was away for {state.blind_seconds:.1f} s; training went on",
        detector="the journal has an earlier life of the daemon",
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
    known = {node for i in state.incidents.values() if i.kind == "bad_gpu" for node in i.nodes}
    for name in state.allocation.nodes if state.allocation else ():
        node = state.nodes.get(name)
        if node is None or node.verdict is not Verdict.BAD or node.excluded_by or name in known:
            continue
        used = attempt is not None and attempt.live and name in attempt.nodes
        return IncidentOpened(
            incident=_name(state),
            failure="bad_gpu",
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


def _signal(state: State) -> IncidentOpened | None:
    attempt = state.attempt
    if attempt is None or _explained(state, attempt):
        return None
    raised = next((s for s in state.signals.values() if s.tier is Tier.ACT and s.attempt == attempt.name), None)
    if raised is None:
        return None
    return IncidentOpened(
        incident=_name(state),
        failure=raised.signal,
        cause=_cause(raised),
        detector=raised.rule,
        attempt=attempt.name,
        nodes=raised.nodes,
        step_failed=raised.step if raised.step is not None else attempt.last_step,
        onset_step=raised.onset_step,
        at=raised.at,
        evidence=raised.evidence,
        drill=_drill(state, raised),
    )


def _ended_attempt(state: State, now: float) -> IncidentOpened | None:
    """An attempt that ended and that no signal explains: nothing may be left without an answer."""
    attempt = state.attempt
    if attempt is None or attempt.live or _explained(state, attempt):
        return None
    return IncidentOpened(
        incident=_name(state),
        failure="process_death",
        cause=f"attempt {attempt.name} {attempt.outcome} at step {attempt.last_step}; no finding says why",
        detector="an attempt ended before the last step",
        attempt=attempt.name,
        nodes=(),
        step_failed=attempt.last_step,
        onset_step=None,
        at=attempt.ended_at or now,
    )


def _explained(state: State, attempt: Attempt) -> bool:
    """Whether an incident already answers for this attempt: later findings about it are its consequences."""
    return any(i.attempt == attempt.name and i.kind != "daemon_restart" for i in state.incidents.values())


def _cause(raised: SignalRaised) -> str:
    evidence = raised.evidence
    match raised.signal:
        case "process_death" | "user_error" | "checkpoint_refused":
            where = f"rank {evidence['rank']} on {', '.join(raised.nodes)}"
            if number := evidence.get("signal"):
                return f"{where} was killed by signal {number} ({_signal_name(int(number))})"
            return f"{where} left with code {evidence['code']}"
        case "loss_spike":
            return (
                f"loss {evidence['loss']:.3f} at step {raised.step}, median {evidence['median']:.3f}; "
                f"out of its band since step {raised.onset_step}"
            )
        case "non_finite_loss":
            return f"loss or gradient norm not finite at step {raised.step}"
        case "hang":
            patience = f"patience is {evidence['patience']:.0f} s"
            return f"no step for {evidence['seconds']:.0f} s in {evidence['phase']}, {patience}"
        case "silent_node":
            return f"{', '.join(raised.nodes)} silent for {evidence['seconds']:.0f} s"
        case "allocation_lost":
            return f"job {evidence['job']} ended under the attempt: {evidence['reason']}"
        case _:
            return f"{raised.signal}: {raised.rule}"


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "not a signal of this platform"


def _drill(state: State, raised: SignalRaised) -> str | None:
    return next((drill.name for drill in state.drills.values() if _behind(drill, raised)), None)


def _behind(drill: Drill, raised: SignalRaised) -> bool:
    if drill.attempt != raised.attempt:
        return False
    if drill.fault is Fault.LR and raised.signal in ("loss_spike", "non_finite_loss"):
        return (raised.onset_step or 0) > int(drill.arguments["from_step"])
    if drill.fault is Fault.KILL_RANK and raised.signal == "process_death":
        return raised.evidence.get("rank") == drill.arguments["rank"] and raised.evidence.get("signal") == 9
    return False
