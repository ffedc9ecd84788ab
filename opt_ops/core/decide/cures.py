"""Which rung an incident gets: the cure of its likeliest cause, or the next one of the general ladder.

A cure that failed for the same trouble is not chosen again. Then comes the next likely cause, then the general ladder,
which ends with its last rung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opt_ops.core.decide.policy import Playbook, Policy, Rung
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.decide.retry_budget import failure_step, spent_before, tries_around
from opt_ops.core.decide.trouble import earlier_tries, onset_of
from opt_ops.core.failures.causes import Cause
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action, Skip

SURE = 0.5
"""The confidence from which the cure of a cause is chosen: likelier than all others together."""
LIKELY = 0.2
"""The same once a cure has failed for this trouble: then a good guess is better than the next cut of the ladder."""

_MOST_SKIPPED = 1024  # batches that a cure leaves out at most


@dataclass(frozen=True, slots=True)
class RungChoice:
    """The rung that an incident gets.

    Attributes:
        number: Its place in the playbook, from 0; where a budget is spent, how many actions were.
        rung: None: the ladder or a budget is used up.
        reason: For the journal.
        skips: The batches that it leaves out around the onset.
        takes_back: The incidents whose changes it undoes.
    """

    number: int
    rung: Rung | None
    reason: str
    skips: tuple[Skip, ...] = ()
    takes_back: tuple[str, ...] = ()


def choose_rung(state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy) -> RungChoice:
    """The rung that an incident gets by its causes, by its playbook, and by what was tried and spent before."""
    spent = spent_before(state, incident, playbook, now, policy)
    if spent.exhausted:
        return RungChoice(spent.actions, None, spent.reason)
    here = incident.onset_step or failure_step(state, incident)
    tries = earlier_tries(state, here, playbook.budget.settle_steps, incident.name)
    if (cure := _cure(state, incident, playbook, tries, spent.reason)) is not None:
        return cure
    number = playbook.in_place_rungs + tries_around(state, incident, playbook)
    while number < len(playbook.ladder) and _failed_as_cure(playbook.ladder[number], tries):
        number += 1
    if number >= len(playbook.ladder):
        tried = f"{len(tries) or number - playbook.in_place_rungs} tries around this step did not cure it"
        return RungChoice(number, None, f"ladder of {playbook.name} is used up: {tried}")
    return RungChoice(number, playbook.ladder[number], spent.reason)


def _cure(
    state: State, incident: Incident, playbook: Playbook, tries: Sequence[Incident], spent: str
) -> RungChoice | None:
    """The first cure of the likeliest causes that was not tried and that would change something."""
    enough = LIKELY if tries else SURE
    for suspicion in incident.causes:
        if suspicion.confidence < enough:
            return None
        cause = suspicion.cause
        for number, rung in enumerate(playbook.cures, len(playbook.ladder)):
            if rung.cause is not cause or _changes_nothing(state, incident, rung):
                continue
            skips = skipped_around(onset_of(state, incident)) if rung.skip_onset else ()
            if _tried(rung, skips, tries):
                continue
            reason = f"{cause} ({suspicion.confidence:.0%}): {'; '.join(suspicion.evidence_for[:2])}; {spent}"
            undone = tuple(each.name for each in tries) if rung.action is Action.ROLLBACK else ()
            return RungChoice(number, rung, reason, skips, undone)
        if cause is Cause.LR_TOO_HIGH and _cuts_left(state, incident, playbook):
            return None  # the ladder is its cure
    return None


def _cuts_left(state: State, incident: Incident, playbook: Playbook) -> bool:
    left = playbook.ladder[tries_around(state, incident, playbook) :]
    return any(rung.lr_factor is not None for rung in left)


def _changes_nothing(state: State, incident: Incident, rung: Rung) -> bool:
    """Whether the rung only asks for settings of the optimizer that are in force already."""
    known = baseline(state)
    if "asked_betas" in onset_of(state, incident).get("optimizer", {}):
        return False  # the optimizer does not use what was asked for: asking again is a change
    if not rung.settings or known is None or state.run is None or rung.lr_factor is not None:
        return False
    now = with_settings(*known, state.run.settings)
    there = all(setting in state.run.settings or _of_proof(setting) for setting in rung.settings)
    return there and with_settings(*now, rung.settings) == now


def _of_proof(setting: str) -> bool:
    """Whether the setting is one of those that are read back from the optimizer."""
    return setting.partition("=")[0] in ("optim.betas", "optim.weight_decay", "optim.clip_norm")


def _tried(rung: Rung, skips: tuple[Skip, ...], tries: Sequence[Incident]) -> bool:
    """Whether the same action with the same parameters was tried. Other batches to skip are other parameters."""
    all_skipped = rung.skip_data or (rung.skip_onset and not skips)
    return any(
        (decision := tried.decision) is not None
        and decision.action is rung.action
        and decision.lr_factor == rung.lr_factor
        and decision.settings == rung.settings
        and (decision.refuses is not None) == rung.older
        and decision.skips == skips
        and bool(decision.skip_batches) == all_skipped
        and decision.cause is rung.cause
        for tried in tries
    )


def _failed_as_cure(rung: Rung, tries: Sequence[Incident]) -> bool:
    """Whether a rung of the general ladder would do what the cure of some cause did in vain."""
    if rung.action is not Action.ROLLBACK:
        return False
    return any(
        (decision := tried.decision) is not None
        and decision.cause is not None
        and decision.action is rung.action
        and decision.lr_factor == rung.lr_factor
        and decision.settings == rung.settings
        and not (decision.skips or decision.skip_batches or rung.skip_data or decision.refuses)
        for tried in tries
    )


def skipped_around(onset: Mapping[str, Any]) -> tuple[Skip, ...]:
    """The batches to leave out: from the onset's to the last bad one; nothing where telemetry does not name them.

    The onset is only known to a line of telemetry. While the trouble is not over, as many again are left out: a shard
    does not end where it was found.
    """
    data = onset.get("data")
    if data is None:
        return ()
    first, last, apart = data["batch"], data["last"], onset.get("interval", 1)
    if data["still"]:
        last += last - first + 1
    first = max(1, first - apart)
    return (Skip(first=first, last=min(last + apart - 1, first + _MOST_SKIPPED - 1)),)
