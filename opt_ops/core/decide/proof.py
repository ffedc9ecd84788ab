"""Proof: an action is done when telemetry shows it.

OPT-175B lost days to an optimizer that had reloaded its old betas from the checkpoint. So an incident is closed
only when the settings that the live optimizer used were read back from telemetry and compared with what was
decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.suspects import is_condemned
from opt_ops.core.events import IncidentClosed
from opt_ops.core.names import attempt_folder
from opt_ops.core.schedule import TABLE, PlannedLr, factor_at, is_computed, peak_of
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, State, left_out_key
from opt_ops.core.state.queries import last_step
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Optimizer, Readback, Schedule

# Both sides compute the schedule in double precision; only the order of operations may differ.
_TOLERANCE = 1e-9
_TOLERANCE_OF_PEAK = 1e-14
"""Near the end of a cosine to zero little is left but the rounding of 1 + cos, which is about 1e-16 of the peak."""
_MOST_AT_ZERO = 8
"""Updates with a learning rate of zero for which others are waited for. Where it stays zero, it is never above."""
_MOST_UNSEEN = 10
"""Steps at the beginning of an attempt whose telemetry may be missing, if lines of it were left out as unreadable."""


def prove(state: State, incident: Incident, policy: Policy) -> IncidentClosed | None:
    """The incident's end with its proof, or None while the evidence is not in."""
    assert incident.decision is not None
    action = incident.decision.action
    if incident.decision.advice or action is Action.NOTIFY or (action is Action.HALT and incident.answered):
        return _unproven(state, incident)
    if state.status is Status.COMPLETED:
        return _moot(state, incident)
    if action is Action.EXCLUDE:
        return _prove_exclusion(state, incident)
    if action is Action.ADOPT:
        return _prove_adoption(state, incident)
    if action is Action.HALT or incident.next_attempt is None:
        return None
    attempt = state.attempts[incident.next_attempt]
    playbook = policy.playbooks.get(incident.kind)
    wanted = playbook.proof_steps if playbook else 1
    return prove_attempt(state, incident, attempt, wanted)


def baseline(state: State) -> tuple[Schedule, Optimizer] | None:
    """The schedule and optimizer settings of the lineage's first attempt that stated them: what was asked for."""
    for attempt in state.attempts.values():
        if attempt.schedule is not None and attempt.optimizer is not None:
            return attempt.schedule, attempt.optimizer
    return None


def planned_lr(state: State, attempt: Attempt) -> PlannedLr | None:
    """The learning rates that an attempt must use; None: no attempt of the lineage has stated its schedule yet."""
    known, run = baseline(state), state.runs[attempt.run]
    if known is None:
        return None
    return PlannedLr(schedule=with_settings(*known, run.settings)[0], factors=run.lr_factors)


def with_settings(schedule: Schedule, optimizer: Optimizer, settings: tuple[str, ...]) -> tuple[Schedule, Optimizer]:
    """Schedule and optimizer after a run's own `key=value` settings. What is no number changes nothing: the readbacks
    will say what the trainer made of it."""
    for setting in settings:
        with suppress(ValueError, OverflowError):
            schedule, optimizer = _with(schedule, optimizer, setting)
    return schedule, optimizer


def enough_readbacks(rates: Sequence[float], wanted: int) -> bool:
    """Whether these learning rates, read back from the first updates of an attempt, are enough for a proof.

    Zero times any factor is zero: such an update does not count, and a later one is needed.
    """
    return sum(rate != 0.0 for rate in rates) >= wanted or len(rates) >= wanted + _MOST_AT_ZERO


def _with(schedule: Schedule, optimizer: Optimizer, setting: str) -> tuple[Schedule, Optimizer]:
    key, _, value = setting.partition("=")
    name = key.removeprefix("optim.")
    if key == "optim.betas":
        optimizer = replace(optimizer, betas=tuple(float(beta) for beta in value.split(",")))
    elif key in ("optim.weight_decay", "optim.clip_norm"):
        optimizer = replace(optimizer, **{name: float(value)})
    elif schedule.kind == TABLE:
        pass  # its knots say all
    elif key in ("optim.peak_lr", "optim.final_fraction", "optim.cycles"):
        schedule = replace(schedule, **{name: float(value)})
    elif key == "optim.exponent":
        schedule = replace(schedule, power=float(value))
    elif key in ("optim.warmup_steps", "optim.total_steps", "optim.decay_steps"):
        schedule = replace(schedule, **{name: int(float(value))})
    elif key == "optim.schedule":
        schedule = replace(schedule, kind=value)
    elif key == "optim.decay":
        schedule = replace(schedule, decay=value)
    return schedule, optimizer


def prove_attempt(state: State, incident: Incident, attempt: Attempt, wanted: int) -> IncidentClosed | None:
    """The proof by the first `wanted` steps of the attempt that followed; None while they are not in."""
    known = baseline(state)
    if known is None or attempt.first_step is None or attempt.first_step_at is None:
        return None
    steps_left = (attempt.steps or 0) - attempt.first_step + 1
    read = attempt.readbacks
    if len(read) < steps_left and not enough_readbacks([each.lr for each in read], wanted):
        return None
    run = state.runs[attempt.run]
    schedule, optimizer = with_settings(*known, run.settings)
    planned = PlannedLr(schedule=schedule, factors=run.lr_factors)
    mismatch = _mismatch(state, attempt, planned, optimizer)
    computed = is_computed(schedule)
    proof: dict[str, Any] = {
        "attempt": attempt.name,
        "first_step": attempt.first_step,
        "nodes": list(attempt.nodes),
        "schedule_proven": not mismatch and computed,
        **({} if computed else {"factors_proven": not mismatch and any(each.base_lr for each in read)}),
        "readbacks": [compared(planned, each) for each in read],
    }
    if mismatch:
        proof["mismatch"] = mismatch
    failed = state.attempts[incident.attempt] if incident.attempt else None
    start = attempt.checkpoint.step if attempt.checkpoint else 0
    resumed = attempt.first_step - 1 if mismatch else start
    last_step = failed.last_step if failed and failed.last_step is not None else incident.step_failed
    return IncidentClosed(
        incident=incident.name,
        proven=not mismatch,
        proof=proof,
        step_resumed=resumed,
        steps_lost=max(0, (last_step or 0) - resumed),
        seconds_down=attempt.first_step_at - _stopped_at(incident, failed),
    )


def compared(planned: PlannedLr, read: Readback) -> dict[str, Any]:
    """What was read back beside what was expected; of a schedule that is not computed, the factor."""
    found = {"step": read.step, "lr": read.lr, "expected_lr": planned.at(read.step), "loss": read.loss}
    if read.base_lr is not None and not is_computed(planned.schedule):
        found |= {"base_lr": read.base_lr, "expected_factor": factor_at(planned.factors, read.step)}
    return found


def _stopped_at(incident: Incident, failed: Attempt | None) -> float:
    """When useful work ended: the last step's time, or the first evidence where no step was made."""
    if failed is not None and failed.last_step_at is not None:
        return failed.last_step_at
    return incident.at


def most_unseen(state: State, attempt: Attempt) -> int:
    """The first steps that may be missing in telemetry: none, unless lines of it were left out."""
    left_out = left_out_key("telemetry", f"{attempt_folder(attempt.name)}/telemetry.jsonl") in state.left_out
    return _MOST_UNSEEN if left_out else 0


def _mismatch(state: State, attempt: Attempt, planned: PlannedLr, optimizer: Optimizer) -> str:
    start = attempt.checkpoint.step if attempt.checkpoint else 0
    unseen = (attempt.first_step or 0) - (start + 1)
    if not 0 <= unseen <= most_unseen(state, attempt):
        return f"first step {attempt.first_step}, not {start + 1}"
    known = (node for name in attempt.nodes if (node := state.nodes.get(name)) is not None)
    excluded = [node.name for node in known if node.excluded_by and node.excluded_at <= attempt.intended_at]
    if excluded:
        return f"runs on the excluded node {', '.join(excluded)}"
    return mismatch_of(planned, optimizer, attempt.readbacks)


def mismatch_of(planned: PlannedLr, optimizer: Optimizer, readbacks: Sequence[Readback]) -> str:
    """The first thing that the live optimizer did otherwise than decided; empty if there is nothing."""
    least = _TOLERANCE_OF_PEAK * peak_of(planned.schedule) if is_computed(planned.schedule) else 0.0
    for readback in readbacks:
        expected = planned.due(readback.step, readback.base_lr)
        if expected is not None and not math.isclose(readback.lr, expected, rel_tol=_TOLERANCE, abs_tol=least):
            return f"step {readback.step}: learning rate {readback.lr!r}, not {expected!r}"
        used = Optimizer(betas=readback.betas, weight_decay=readback.weight_decay, clip_norm=readback.clip_norm)
        if used != optimizer:
            return f"step {readback.step}: optimizer {used}, not {optimizer}"
        if readback.loss is None:
            return f"step {readback.step}: the loss is not finite"
    return ""


def _prove_exclusion(state: State, incident: Incident) -> IncidentClosed | None:
    drains = {name: state.nodes[name].drain for name in incident.nodes if name in state.nodes}
    wanted = {name for name in drains if is_condemned(state, state.nodes[name])}
    if any(drain not in ("done", "refused") for name, drain in drains.items() if name in wanted):
        return None
    return IncidentClosed(
        incident=incident.name,
        proven=True,
        proof={"excluded": sorted(drains), "drain": drains},
        step_resumed=None,
        steps_lost=0,
        seconds_down=0.0,
    )


def _prove_adoption(state: State, incident: Incident) -> IncidentClosed | None:
    attempt = state.attempt
    if attempt is None or attempt.progress_epoch < incident.opened_epoch:
        return None
    return IncidentClosed(
        incident=incident.name,
        proven=True,
        proof={"attempt": attempt.name, "step": attempt.last_step, "seen_by_epoch": attempt.progress_epoch},
        step_resumed=None,
        steps_lost=0,
        seconds_down=0.0,
    )


def _unproven(state: State, incident: Incident) -> IncidentClosed:
    """Nobody acted on the decision, or an operator has answered it: there is nothing to prove."""
    decision = incident.decision
    assert decision is not None
    proof = {"answered_by_operator": True}
    if decision.advice or decision.action is Action.NOTIFY:
        proof = {"advice" if decision.advice else "told": True}
    return IncidentClosed(
        incident=incident.name, proven=None, proof=proof, step_resumed=None, steps_lost=None, seconds_down=None
    )


def _moot(state: State, incident: Incident) -> IncidentClosed:
    """The last step was trained before the recovery was needed or could be proven by further steps."""
    return IncidentClosed(
        incident=incident.name,
        proven=True,
        proof={"completed_at_step": last_step(state)},
        step_resumed=None,
        steps_lost=0,
        seconds_down=0.0,
    )
