"""Findings of detectors, and telemetry, as what the journal holds of them."""

from __future__ import annotations

from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.point import Point
from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.model import Attempt, State
from opt_ops.core.values import Readback, Tier

_SAME_STEP_RANGE = 10  # steps: two onsets so close are the same fault of the recipe or its data


def recurs_at_same_step(state: State, raised: SignalRaised) -> bool:
    """Whether the loss of this run left its band at this step before, in an earlier attempt.

    Something else ended that attempt before the loss recovered. It will not recover in the next one either.
    """
    if raised.signal != FailureClass.LOSS_SPIKE or raised.tier is not Tier.ALERT or raised.onset_step is None:
        return False
    run = state.attempts[raised.attempt].run
    return any(
        earlier.signal == raised.signal
        and earlier.tier is Tier.ALERT
        and earlier.attempt != raised.attempt
        and state.attempts[earlier.attempt].run == run
        and abs((earlier.onset_step or 0) - raised.onset_step) <= _SAME_STEP_RANGE
        for earlier in state.signals.values()
    )


def readback_of(point: Point) -> Readback:
    """What the live optimizer used for an update."""
    return Readback(
        step=point.step,
        lr=point.lr,
        betas=point.betas,
        weight_decay=point.weight_decay,
        clip_norm=point.clip_norm,
        loss=point.loss,
    )


def signal_of(attempt: Attempt, finding: Finding) -> SignalRaised:
    """The finding as a signal of its attempt, with the nodes of the ranks that it names."""
    rank, certain = finding.evidence.get("rank"), finding.evidence.get("certain", True)
    ranks = finding.evidence.get("ranks", () if rank is None else (rank,))
    nodes = attempt.nodes_of(ranks)
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
    )
