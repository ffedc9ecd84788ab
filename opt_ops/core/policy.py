"""Playbooks as data, and the three questions that a decision asks of them: which rung, is there budget, which
checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opt_ops.core.run import Incident, KnownCheckpoint, State, ancestry
from opt_ops.core.signals import HangRule, SpikeRule
from opt_ops.core.values import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of a playbook's ladder."""

    action: Action
    lr_factor: float | None = None  # of a rollback
    margin_steps: int = 0  # of a rollback: how far before the onset, at least
    exclude: bool = False  # whether the incident's nodes are taken out


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How often a playbook may act before a human is called. Drills do not spend it."""

    actions: int
    hours: float
    settle_steps: int | None  # training this far past a failure starts the ladder anew; None: every case is a new one


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
class Policy:
    """All that `decide` and the watchers go by."""

    version: str  # digest of the playbooks
    playbooks: Mapping[str, Playbook]  # by trigger
    spike: SpikeRule
    hang: HangRule
    silent_seconds: float
    join_seconds: float = 5.0  # for the last held nodes to report, once enough have
    preflight_seconds: float = 120.0  # for held nodes that have not been heard
    unfit_seconds: float = 15.0  # when all were heard and too few are fit
    spare_seconds: float = 120.0  # in the queue for spares, before nodes are asked for without them
    examine_seconds: float = 60.0  # that a launch waits for a newer checkpoint's examination
    submit_tries: int = 5
    submit_wait_seconds: float = 30.0
    expected_gpus: int = 0  # per node, as the site says


def choose_rung(state: State, incident: Incident, playbook: Playbook, now: float) -> tuple[int, Rung | None, str]:
    """Which rung of the ladder an incident gets: (its number, the rung or None when a human is needed, why)."""
    earlier = [
        other
        for other in state.incidents.values()
        if other.kind == incident.kind and other.name != incident.name and other.decision and other.drill is None
    ]
    recent = [other for other in earlier if now - other.opened_at <= playbook.budget.hours * 3600]
    spent = f"{len(recent)} of {playbook.budget.actions} actions in {playbook.budget.hours:g} h spent before this one"
    if len(recent) >= playbook.budget.actions:
        return len(recent), None, f"budget of {playbook.name}: {spent}"
    settle, here = playbook.budget.settle_steps, incident.onset_step or incident.step_failed or 0
    unsettled = [other for other in earlier if settle is not None and here <= (other.step_failed or 0) + settle]
    number = len(unsettled)
    if number >= len(playbook.ladder):
        return (
            number,
            None,
            f"the ladder of {playbook.name} is used up: {number} tries around this step did not cure it",
        )
    return number, playbook.ladder[number], spent


def newest_good(state: State, run: str, before: int | None = None) -> KnownCheckpoint | None:
    """The newest verified, healthy checkpoint on the way to `run`'s weights, at or before step `before`."""
    good = [known for known in _on_the_way(state, run) if known.good and _within(known.checkpoint.step, before)]
    return max(good, key=lambda known: known.checkpoint.step, default=None)


def under_examination(state: State, run: str, since: float) -> KnownCheckpoint | None:
    """A checkpoint seen after `since` that would be the newest good one, if its examination finds nothing."""
    newest = newest_good(state, run)
    step = newest.checkpoint.step if newest else 0
    waiting = (known for known in _on_the_way(state, run) if known.verified is None and known.seen_at > since)
    return next((known for known in waiting if known.checkpoint.step > step), None)


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
    before = [known for known in _on_the_way(state, run) if known.good and known.checkpoint.step < onset]
    if before:
        oldest = min(before, key=lambda known: known.checkpoint.step)
        return oldest, f"none is {margin} steps before the onset at {onset}: the oldest verified healthy one"
    return None, f"no verified healthy checkpoint before the onset at {onset}: from scratch"


def _within(step: int, limit: int | None) -> bool:
    return limit is None or step <= limit
