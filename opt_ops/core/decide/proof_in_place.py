"""Proof of a replacement in place: the other processes are the same, and each step that follows is there once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.proof import (
    baseline,
    compared,
    enough_readbacks,
    mismatch_of,
    most_unseen,
    prove_attempt,
    with_settings,
)
from opt_ops.core.events import IncidentClosed
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.schedule import PlannedLr, is_computed
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.in_place import joined, replacements
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Readback

_NOTHING_BROKEN = frozenset({FailureClass.BAD_GPU, FailureClass.STRAGGLER, FailureClass.PREEMPTION})
"""Training went on until the replacement was ordered: that is when it stood still."""


def prove_in_place(state: State, incident: Incident, policy: Policy) -> IncidentClosed | None:
    """The incident's end with its proof, or None while the evidence is not in."""
    attempt = state.attempts[incident.attempt or ""]
    found = joined(state, incident)
    if found is None:
        return None
    first = replacements(state, incident)[0]
    since = (first.intended_at if incident.kind in _NOTHING_BROKEN else incident.at, found)
    later = [m for m in attempt.members if m.generation >= found.generation and m.first_step is not None]
    if not later:
        return None if attempt.live else _by_next_attempt(state, incident, attempt, *since)
    playbook, shown = policy.playbooks.get(incident.kind), later[0]
    if not _enough(attempt, shown, playbook.proof_steps if playbook else 1):
        return None
    return _closed(state, incident, attempt, *since, shown)


def _enough(attempt: Attempt, shown: Members, wanted: int) -> bool:
    """Whether there are as many steps as a proof needs, or no more will come of this generation."""
    read = shown.readbacks
    steps_left = (attempt.steps or 0) - (shown.first_step or 0) + 1
    over = not attempt.live or attempt.generation > shown.generation
    return over or len(read) >= steps_left or enough_readbacks([each.lr for each in read], wanted)


def _closed(
    state: State, incident: Incident, attempt: Attempt, down_since: float, found: Members, shown: Members
) -> IncidentClosed | None:
    known = baseline(state)
    if known is None or shown.first_step_at is None:
        return None
    run = state.runs[attempt.run]
    schedule, optimizer = with_settings(*known, run.settings)
    planned = PlannedLr(schedule=schedule, factors=run.lr_factors)
    kept = None if found.kept is None else found.kept == attempt.ranks - len(found.new)
    mismatch = _mismatch(state, attempt, shown) or mismatch_of(planned, optimizer, shown.readbacks)
    if not mismatch and kept is False:
        mismatch = f"{found.kept} of {attempt.ranks - len(found.new)} processes that were to stay are the same"
    proof: dict[str, Any] = {
        "attempt": attempt.name,
        "generation": found.generation,
        "ranks_replaced": list(found.new),
        "pids_kept": kept,
        "steps_repeated": found.repeated,
        "first_step": shown.first_step,
        "nodes": list(found.nodes),
        "schedule_proven": not mismatch and is_computed(schedule),
        "readbacks": [compared(planned, each) for each in shown.readbacks],
    }
    if mismatch:
        proof["mismatch"] = mismatch
    return IncidentClosed(
        incident=incident.name,
        proven=not mismatch,
        proof=proof,
        step_resumed=found.step,
        steps_lost=0,
        seconds_down=max(0.0, shown.first_step_at - down_since),
    )


def _mismatch(state: State, attempt: Attempt, shown: Members) -> str:
    """What is wrong with the steps of a generation."""
    unseen = (shown.first_step or 0) - ((shown.step or 0) + 1)
    if not 0 <= unseen <= most_unseen(state, attempt):
        return f"first step {shown.first_step}, not {(shown.step or 0) + 1}"
    if not unseen and (again := _not_once(shown.readbacks)) is not None:
        return f"step {again} does not follow the one before"
    known = (node for name in shown.nodes if (node := state.nodes.get(name)) is not None)
    excluded = [node.name for node in known if node.excluded_by and node.excluded_at <= shown.intended_at]
    return f"runs on the excluded node {', '.join(excluded)}" if excluded else ""


def _not_once(readbacks: Sequence[Readback]) -> int | None:
    """The first step that does not follow the one before by one, or whose data does not."""
    for before, after in pairwise(readbacks):
        known = before.position is not None and after.position is not None
        if after.step != before.step + 1 or (known and (after.position or 0) <= (before.position or 0)):
            return after.step
    return None


def _by_next_attempt(
    state: State, incident: Incident, attempt: Attempt, down_since: float, found: Members
) -> IncidentClosed | None:
    """The ranks had joined, and the attempt ended before it made a step: what followed shows what became of it."""
    names = list(state.attempts)
    following = names[names.index(attempt.name) + 1 :]
    closed = prove_attempt(state, incident, state.attempts[following[0]], 1) if following else None
    if closed is None or found.joined_at is None:
        return closed
    return replace(closed, steps_lost=0, seconds_down=max(0.0, found.joined_at - down_since))
