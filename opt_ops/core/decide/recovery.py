"""Decides about an open incident: by its playbook, or as the operator asked."""

from __future__ import annotations

from dataclasses import replace

from opt_ops.core.decide.asking import ask_first, withdraw_all
from opt_ops.core.decide.cures import RungChoice, choose_rung
from opt_ops.core.decide.ends import decide_at_end
from opt_ops.core.decide.members import is_rejoining
from opt_ops.core.decide.operator_changes import decide_request
from opt_ops.core.decide.policy import SCRATCH_STEPS, Playbook, Policy, Rung
from opt_ops.core.decide.replacement import REPLACEABLE, Replacement, described, is_question, replace_lost
from opt_ops.core.decide.retry_budget import in_place_exhausted, rollback_point, tried_here
from opt_ops.core.decide.suspects import nodes_to_exclude, program_fails
from opt_ops.core.decide.trouble import onset_of
from opt_ops.core.events import Event, RecoveryDecided
from opt_ops.core.failures.causes import Cause
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import probing
from opt_ops.core.text import count
from opt_ops.core.values import Action, Driver


def decide_recovery(state: State, now: float, policy: Policy) -> Event | None:
    """Decide about an open incident: by its playbook, or as the operator asked. A person may be asked first."""
    if state.ended:
        return withdraw_all(state)
    for incident in state.incidents.values():
        if incident.decision is not None or probing(incident):
            continue
        if incident.kind == FailureClass.OPERATOR:
            return decide_request(state, incident)
        live = state.attempt is not None and state.attempt.live
        if live and incident.kind in REPLACEABLE and is_rejoining(state, incident.attempt):
            continue  # it is decided about once these ranks have joined, or have failed to
        if incident.stacks_at is None or incident.stacks is not None or not live:  # who has left answers no more
            by_playbook = _after_fall_back(incident, _decide_by_playbook(state, incident, now, policy))
            decided = decide_at_end(state, incident, by_playbook, now, policy)
            if decided is not None and (event := ask_first(state, incident, decided, now, policy)) is not None:
                return event
    return None


def _after_fall_back(incident: Incident, decided: RecoveryDecided) -> RecoveryDecided:
    """The decision about an attempt whose ranks were told to meet anew and have not: it must end, and cannot save."""
    if incident.fell_back is None or decided.advice:
        return decided
    if decided.action is Action.NOTIFY:
        return replace(decided, action=Action.RESTART, why=f"the attempt cannot go on as it is; {decided.why}")
    return replace(decided, save_first=False)


def _decide_by_playbook(state: State, incident: Incident, now: float, policy: Policy) -> RecoveryDecided:
    waited = incident.probes is not None or incident.proposal is not None
    by_person = incident.answered and waited  # while it waited
    advice = not state.driver.acts or by_person
    playbook = policy.playbook_for(incident.kind)
    if playbook is None:
        why = f"no playbook is triggered by {incident.kind}"
        return RecoveryDecided(
            incident=incident.name, playbook="none", version=0, rung=0, action=Action.HALT, why=why, advice=advice
        )
    first, spare, found = playbook.first_restart, not _touches_live_work(state, incident), None
    if spare and first.action is Action.RESTART and first.exclude:  # which spends no budget, so it is held to none
        choice = RungChoice(playbook.in_place_rungs, first, "a spare")
    else:
        choice, found = _choose(state, incident, playbook, now, policy)
    number, rung, why = choice.number, choice.rung, choice.reason
    decided = RecoveryDecided(
        incident=incident.name,
        playbook=playbook.name,
        version=playbook.version,
        rung=number,
        action=rung.action if rung else _action_when_exhausted(playbook),
        why=why,
        exclude=nodes_to_exclude(state, incident) if rung and rung.exclude else (),
        save_first=rung is not None and rung.save_first,
        advice=advice,
        cause=rung.cause if rung else None,
        nodes=found.nodes if isinstance(found, Replacement) else (),
        ranks=found.ranks if isinstance(found, Replacement) else (),
        not_in_place=found if isinstance(found, str) else None,
    )
    if decided.action is Action.NOTIFY and _has_stopped(state, incident):
        return replace(
            decided, action=Action.HALT, why=f"{playbook.name} only notifies on-call, but nothing trains; {why}"
        )
    if rung is None:
        return decided
    if rung.action is not Action.HALT and (program := program_fails(state, incident)) is not None:
        changes = {"exclude": (), "save_first": False, "nodes": (), "ranks": ()}
        return replace(decided, action=Action.HALT, why=f"{program}; {why}", **changes)
    if rung.action is Action.HALT:
        tries = number - playbook.in_place_rungs
        tried = f"{count(tries, 'try', 'tries')} around this step did not help"
        return replace(decided, why=f"{tried if tries > 0 else 'trying again would not help'}; {why}")
    if rung.action is Action.RESTART and not _touches_live_work(state, incident):
        why = f"it was a spare, so training was not touched; {why}"
        return replace(decided, action=Action.EXCLUDE, save_first=False, why=why)
    if rung.action is Action.ROLLBACK and incident.attempt is None:
        why = f"nothing is rolled back for what trains nothing; {why}"
        return replace(decided, action=Action.EXCLUDE if rung.exclude else Action.NOTIFY, why=why)
    if rung.action is Action.ROLLBACK:
        return _rolled_back(state, incident, choice, decided)
    return decided


def _choose(
    state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy
) -> tuple[RungChoice, Replacement | str | None]:
    """The rung, and the replacement of ranks if it is that rung; or, in words, why there is none."""
    if not playbook.in_place_rungs or not is_question(state, incident, policy):
        return choose_rung(state, incident, playbook, now, policy), None
    found = _replacement(state, incident, playbook, now, policy)
    if isinstance(found, Replacement):
        return RungChoice(0, playbook.ladder[0], described(state, found)), found
    choice = choose_rung(state, incident, playbook, now, policy)
    return replace(choice, reason=f"not in place: {found}; {choice.reason}"), found


def _replacement(state: State, incident: Incident, playbook: Playbook, now: float, policy: Policy) -> Replacement | str:
    if (other := tried_here(state, incident, playbook)) is not None and incident.fell_back is None:
        return f"{other.name} was at the same place"
    if (spent := in_place_exhausted(state, incident, playbook, now)) is not None:
        return spent
    exclude = nodes_to_exclude(state, incident) if playbook.ladder[0].exclude else ()
    return replace_lost(state, incident, exclude, now, policy)


def _has_stopped(state: State, incident: Incident) -> bool:
    """Whether the incident ended its attempt: without a halt the next one would start at once, on no budget."""
    attempt = state.attempts.get(incident.attempt or "")
    return (
        incident.kind == FailureClass.PROCESS_DEATH
        and incident.signal is None
        and attempt is not None
        and not attempt.live
    )


def _action_when_exhausted(playbook: Playbook) -> Action:
    """The action when the ladder or a retry budget is used up. A ladder that ends with `tell` never stops training."""
    return Action.NOTIFY if playbook.ladder[-1].action is Action.NOTIFY else Action.HALT


def _rolled_back(state: State, incident: Incident, choice: RungChoice, decided: RecoveryDecided) -> RecoveryDecided:
    rung = choice.rung
    assert rung is not None
    assert incident.attempt is not None
    attempt = state.attempts[incident.attempt]
    refuses = attempt.checkpoint if rung.older else None
    onset = refuses.step if refuses else _rollback_onset(state, incident, rung)
    margin = 1 if refuses else max(rung.margin_steps, incident.margin_steps)
    known, where = rollback_point(state, attempt.run, onset, margin)
    checkpoint = known.checkpoint if known else None
    if checkpoint is None and state.driver is Driver.SHADOW and not state.checkpoints:
        why = f"to a checkpoint at or before step {max(0, onset - margin)}; which there are is not known here"
        return replace(decided, lr_factor=rung.lr_factor, settings=rung.settings, why=f"{why}; {decided.why}")
    if checkpoint is None and (parent := state.intent.parent) is not None:
        why = f"no good checkpoint is left, and a fork of {parent.run} does not start from scratch; {decided.why}"
        return replace(decided, action=Action.HALT, exclude=(), why=why)
    if checkpoint is None or checkpoint.step > onset - margin:  # none is as far back as it should be
        lost = onset - checkpoint.step if checkpoint else max(onset, incident.step_failed or 0)
        if lost > SCRATCH_STEPS:
            why = f"{where} would lose more than {SCRATCH_STEPS} steps; {decided.why}"
            return replace(decided, action=Action.HALT, exclude=(), why=why)
    all_skipped = rung.skip_data or (rung.skip_onset and not choice.skips)
    skip = (incident.step_failed or onset) - (checkpoint.step if checkpoint else 0) if all_skipped else 0
    return replace(
        decided,
        checkpoint=checkpoint,
        lr_factor=rung.lr_factor,
        settings=rung.settings,
        skip_batches=max(0, skip),
        skips=choice.skips,
        refuses=refuses,
        takes_back=choice.takes_back,
        why=f"{where}; {decided.why}",
    )


def _rollback_onset(state: State, incident: Incident, rung: Rung) -> int:
    """The step before which the state is sound: where the loss, or the learning rate that did it, left its course."""
    onset = incident.onset_step or incident.step_failed or 0
    if rung.cause is not Cause.UNPLANNED_LR:
        return onset
    return min(onset, onset_of(state, incident).get("lr", {}).get("off_since") or onset)


def _touches_live_work(state: State, incident: Incident) -> bool:
    """Whether the newest attempt is hit: it is the incident's own, or runs on one of its nodes."""
    attempt = state.attempt
    if attempt is None or _has_left(attempt, incident):
        return False
    return attempt.name == incident.attempt or (attempt.live and not set(attempt.nodes).isdisjoint(incident.nodes))


def _has_left(attempt: Attempt, incident: Incident) -> bool:
    """Whether the nodes of the incident have left the attempt in a replacement that has come together since."""
    later = (m for m in attempt.members if m.joined_at is not None and m.joined_at >= incident.opened_at)
    gone = attempt.live and bool(incident.nodes) and set(attempt.nodes).isdisjoint(incident.nodes)
    return gone and attempt.name == incident.attempt and any(later)
