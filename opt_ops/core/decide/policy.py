"""Playbooks as data, and the three questions that a decision asks of them: which rung, is there budget, which
checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opt_ops.core.detect.loss_level import DriftRule
from opt_ops.core.detect.loss_spike import SpikeRule
from opt_ops.core.detect.throughput import HangRule, LossScaleRule, StragglerRule, ThroughputRule
from opt_ops.core.state.model import Incident, KnownCheckpoint, State, ancestry
from opt_ops.core.values import Action, Checkpoint, Severity
from opt_ops.core.waiting import within

SCRATCH_STEPS = 2000
"""As long as no more would be lost, training may start over from scratch without being asked: about the warm-up. Beyond
it, that no checkpoint is left is for a person to judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a playbook's ladder."""

    action: Action
    lr_factor: float | None = None  # of a rollback
    margin_steps: int = 0  # of a rollback: how far before the onset, at least
    exclude: bool = False  # whether the incident's nodes are taken out
    skip_data: bool = False  # of a rollback: whether the batches from the checkpoint to the failure are left out
    save_first: bool = False  # of a restart: the attempt is healthy and leaves after one more checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How often a playbook may act before a human is called. Drills do not spend it."""

    actions: int
    hours: float
    settle_steps: int | None  # training this far past a failure starts the ladder anew; None: every case is a new one
    refill_steps: int | None = None  # training this far past a failure gives back what it spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Playbook:
    """A failure class: what sets it off, what is done, within what budget, and what proves it."""

    name: str
    version: int
    title: str
    triggers: tuple[str, ...]
    ladder: tuple[Rung, ...]
    budget: Budget
    proof_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What holds for all playbooks together."""

    actions: int  # in `hours`, of all playbooks
    hours: float
    refill_steps: int | None
    cordon_per_hour: int  # nodes that may be taken out: a wrong rule must not empty a cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Patience with missing nodes, in seconds."""

    shrink_seconds: float  # without a full set, before training goes on with fewer nodes
    grow_seconds: float  # of training with fewer, before it is interrupted for more
    top_up_seconds: float  # between tries to replace a node that is not needed at once
    successor_seconds: float  # before a time limit, when the next allocation is asked for
    last_call_seconds: float  # before a time limit, when the attempt must save and leave
    leave_seconds: float  # that a leaving attempt gets for its checkpoint
    page_seconds: float  # of waiting for nodes, before a human is called


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """All that `decide` and the watchers go by."""

    version: str  # digest of the playbooks
    playbooks: Mapping[str, Playbook]  # by trigger
    spike: SpikeRule
    drift: DriftRule
    hang: HangRule
    silent_seconds: float
    straggler: StragglerRule
    throughput: ThroughputRule
    loss_scale: LossScaleRule
    limits: Limits
    capacity: Capacity
    dump_seconds: float = 10.0  # that hung ranks get to say where they are
    least_alert: Severity | None = None  # what people are told; None: nobody is
    join_seconds: float = 5.0  # for the last held nodes to report, once enough have
    preflight_seconds: float = 120.0  # for held nodes that have not been heard
    unfit_seconds: float = 15.0  # when all were heard and too few are fit
    spare_seconds: float = 120.0  # in the queue for spares, before nodes are asked for without them
    examine_seconds: float = 60.0  # that a launch waits for a newer checkpoint's examination
    submit_tries: int = 5
    submit_wait_seconds: float = 30.0
    expected_gpus: int = 0  # per node, as the site says


def choose_rung(
    state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy
) -> tuple[int, Rung | None, str]:
    """Which rung of the ladder an incident gets: (its number, the rung or None when a human is needed, why)."""
    counted = [
        (other, _place(state, other))
        for other in state.incidents.values()
        if other.name != incident.name and _counts(other)
    ]
    earlier = [(other, step) for other, step in counted if other.kind == incident.kind]
    budget, limits, here = playbook.budget, policy.limits, incident.onset_step or _place(state, incident)
    recent = _spent(earlier, now, here, budget.hours, budget.refill_steps)
    spent = f"{recent} of {budget.actions} actions in {budget.hours:g} h spent before this one"
    if recent >= budget.actions:
        return recent, None, f"budget of {playbook.name}: {spent}"
    others = [(other, step) for other, step in counted if other.kind not in FREE]
    overall = _spent(others, now, here, limits.hours, limits.refill_steps)
    if overall >= limits.actions and incident.kind not in FREE:
        return overall, None, f"budget of all playbooks: {overall} of {limits.actions} actions in {limits.hours:g} h"
    settle = budget.settle_steps
    number = sum(settle is not None and here <= step + settle for _, step in earlier)
    if number >= len(playbook.ladder):
        return (
            number,
            None,
            f"the ladder of {playbook.name} is used up: {number} tries around this step did not cure it",
        )
    return number, playbook.ladder[number], spent


FREE = frozenset({"daemon_restart", "time_limit", "preemption", "nodes_returned"})
"""What happens by plan, or costs no training: it spends none of the overall budget."""


def _counts(earlier: Incident) -> bool:
    """Whether training was touched, by no drill, and nobody has answered it since. Taking out a spare touches none."""
    touched = earlier.acted_on and earlier.decision is not None and earlier.decision.action is not Action.EXCLUDE
    return touched and earlier.drill is None and not earlier.answered


def _place(state: State, incident: Incident) -> int:
    """The step at which it failed; of a launch that made none, the one where it would have gone on."""
    if incident.step_failed is not None:
        return incident.step_failed
    attempt = state.attempts.get(incident.attempt or "")
    return attempt.checkpoint.step if attempt is not None and attempt.checkpoint is not None else 0


def _spent(earlier: list[tuple[Incident, int]], now: float, here: int, hours: float, refill_steps: int | None) -> int:
    """How many of them still count: young enough, and not yet made good by new progress."""
    return sum(
        now - other.opened_at <= hours * 3600 and (refill_steps is None or here <= step + refill_steps)
        for other, step in earlier
    )


def newest_good(
    state: State, run: str, before: int | None = None, nodes: Sequence[str] | None = None
) -> KnownCheckpoint | None:
    """The newest verified, healthy checkpoint on the way to `run`'s weights, at or before step `before`.

    One that `nodes` can read, where they are known: else one that the nodes held can. Of a snapshot and a durable one
    of the same step, the snapshot: it is read faster.
    """
    good = [
        known
        for known in _on_the_way(state, run)
        if known.good and _within(known.checkpoint.step, before) and at_hand(state, known.checkpoint, nodes)
    ]
    return max(good, key=lambda known: (known.checkpoint.step, bool(known.checkpoint.nodes)), default=None)


def at_hand(state: State, checkpoint: Checkpoint, nodes: Sequence[str] | None = None) -> bool:
    """Whether `nodes`, or those that are held and not excluded, have all of it on their disks."""
    if not checkpoint.nodes:
        return True
    here = nodes if nodes is not None else [name for name in state.held if not _excluded(state, name)]
    return all(any(node in here for node in group) for group in checkpoint.nodes)


def _excluded(state: State, name: str) -> bool:
    node = state.nodes.get(name)
    return node is not None and node.excluded_by is not None


def under_examination(state: State, run: str, now: float, patience: float) -> KnownCheckpoint | None:
    """A checkpoint seen within `patience` that would be the newest good one, if its examination finds nothing."""
    newest = newest_good(state, run)
    step = newest.checkpoint.step if newest else 0
    waiting = (known for known in _on_the_way(state, run) if known.verified is None)
    newer = (known for known in waiting if known.checkpoint.step > step)
    return next((known for known in newer if within(now, known.seen_at, patience)), None)


def _on_the_way(state: State, run: str) -> list[KnownCheckpoint]:
    limits = dict(ancestry(state, run))
    return [
        known
        for known in state.checkpoints.values()
        if known.checkpoint.run in limits and _within(known.checkpoint.step, limits[known.checkpoint.run])
    ]


def rollback_point(state: State, run: str, onset: int, margin: int) -> tuple[KnownCheckpoint | None, str]:
    """Where to roll back to: (the checkpoint, why this one). None: from scratch, for want of any before the onset."""
    if far := newest_good(state, run, onset - margin):
        return far, f"newest verified healthy checkpoint at least {margin} steps before the onset at {onset}"
    before = [
        known
        for known in _on_the_way(state, run)
        if known.good and known.checkpoint.step < onset and at_hand(state, known.checkpoint)
    ]
    if before:
        oldest = min(before, key=lambda known: known.checkpoint.step)
        return oldest, f"none is {margin} steps before the onset at {onset}: the oldest verified healthy one"
    return None, f"no verified healthy checkpoint before the onset at {onset}: from scratch"


def _within(step: int, limit: int | None) -> bool:
    return limit is None or step <= limit
