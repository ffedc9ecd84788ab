"""Findings of detectors, and telemetry, as what the journal holds of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opt_ops.core.decide.proof import baseline, planned_lr, with_settings
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.history import CurveHistory
from opt_ops.core.detect.onset import Place, onset_digest
from opt_ops.core.detect.point import Point
from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.classes import Domain, FailureClass, row
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import State
from opt_ops.core.values import Readback, Tier

_SAME_STEP_RANGE = 10  # steps: two onsets so close are the same fault of the recipe or its data
_UNHEALED_ATTEMPTS = 2  # that end in one spike, before its next coming is acted on at once


def keeps_recurring(state: State, raised: SignalRaised, heal_steps: int, calm: Collection[str]) -> bool:
    """Whether attempts of this run have ended in this spike before it healed, too often to wait for it once more.

    A restart that has nothing to do with the spike gives it the patience of the first time. But attempts that keep
    ending earlier than that must not keep a divergence from its answer for ever. `calm`: attempts that are known to
    have ended outside of any spike.
    """
    if raised.signal != FailureClass.LOSS_SPIKE or raised.tier is not Tier.ALERT or raised.onset_step is None:
        return False
    run = state.attempts[raised.attempt].run
    unhealed = {
        earlier.attempt
        for earlier in state.signals.values()
        if earlier.signal == raised.signal
        and earlier.tier is Tier.ALERT
        and earlier.attempt != raised.attempt
        and state.attempts[earlier.attempt].run == run
        and abs((earlier.onset_step or 0) - raised.onset_step) <= _SAME_STEP_RANGE
        and earlier.attempt not in calm
        and not _healed(state, earlier, heal_steps)
    }
    return len(unhealed) >= _UNHEALED_ATTEMPTS


def _healed(state: State, spike: SignalRaised, heal_steps: int) -> bool:
    """Whether a spike was over when its attempt ended: its time had passed, or a later checkpoint is healthy."""
    last = state.attempts[spike.attempt].last_step or 0
    if last - (spike.onset_step or 0) >= heal_steps:
        return True
    run, seen = state.attempts[spike.attempt].run, spike.step or 0
    of_run = (known for known in state.checkpoints.values() if known.good and known.checkpoint.run == run)
    return any(seen <= known.checkpoint.step <= last for known in of_run)


def readback_of(point: Point) -> Readback:
    """What the live optimizer used for an update."""
    return Readback(
        step=point.step,
        lr=point.lr,
        betas=point.betas,
        weight_decay=point.weight_decay,
        clip_norm=point.clip_norm,
        loss=point.loss,
        base_lr=point.base_lr,
    )


def signal_of(attempt: Attempt, finding: Finding) -> SignalRaised:
    """The finding as a signal of its attempt, with the nodes of the ranks that it names."""
    rank, certain = finding.evidence.get("rank"), finding.evidence.get("certain", True)
    ranks = finding.evidence.get("ranks", () if rank is None else (rank,))
    nodes = attempt.nodes_of(ranks, attempt.generation_at(finding.step))
    if not certain and len(nodes) > 1:
        nodes = ()  # one of them is healthy, and it is not known which
    return SignalRaised(
        signal=finding.signal,
        tier=finding.tier,
        attempt=attempt.name,
        step=finding.step,
        onset_step=finding.onset_step,
        at=finding.at,
        nodes=nodes,
        rule=finding.rule,
        evidence=finding.evidence,
        margin_steps=finding.margin_steps,
    )


def digest_of(
    state: State,
    attempt: Attempt,
    finding: Finding,
    curve: CurveHistory,
    first_step: int | None,
    batch: int | None,
) -> dict[str, Any]:
    """What telemetry shows around the onset, if the finding is trouble with the loss or the settings; else nothing."""
    if row(finding.signal).domain not in (Domain.LOSS, Domain.SETTINGS):
        return {}
    known, plan, optimizer = baseline(state), planned_lr(state, attempt), None
    if known is not None:
        _, optimizer = with_settings(*known, state.runs[attempt.run].settings)
    told = {each.step: each.base_lr for each in curve.kept}
    place = Place(
        first_step=first_step,
        restored_from=attempt.checkpoint.step if attempt.checkpoint else None,
        expected_lr=(lambda step: plan.due(step, told.get(step))) if plan else None,
        optimizer=optimizer,
        batch=batch,
        due=curve.due,
        planned=curve.planned,
    )
    return onset_digest(curve.kept, finding.onset_step, place)
