"""Whether everything is trained: a fact about steps and checkpoints, not about exit codes.

A lineage is done when the last step is trained and the durable checkpoint of that step was examined and is sound.
How the ranks left afterwards changes nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.decide.policy import Policy
from opt_ops.core.events import IncidentOpened, RecoveryDecided
from opt_ops.core.failures.classes import Domain, FailureClass, row
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.checkpoints import KnownCheckpoint
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import newest_good, reachable_checkpoints
from opt_ops.core.values import Action, Outcome, Tier
from opt_ops.core.waiting import still_waiting

_UNSEEN_STEPS = 10
"""Steps at the end whose telemetry may be missing: a trainer may log every tenth step, and a last line may be torn."""


class Standing(StrEnum):
    """What is known of the checkpoint of the last step."""

    WAITS = "waits"  # it may still be written, or is being examined
    SOUND = "sound"  # verified, and healthy by the loss
    DOUBT = "doubt"  # there, but something speaks against it, or it was not examined in time
    LOST = "lost"  # damaged or missing: the last steps must be trained again


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of the newest attempt, whose run has trained its last step.

    Attributes:
        step: The last step that was asked for.
        standing: What is known of its checkpoint.
        why: What speaks against that checkpoint; empty where nothing does.
        good: The newest checkpoint that is verified and healthy, from before any loss trouble that is open.
    """

    step: int
    standing: Standing
    why: str = ""
    good: KnownCheckpoint | None = None


def end_of_training(state: State, now: float, policy: Policy) -> End | None:
    """The end that the newest attempt has reached; None: steps are left to train, or a next run is planned."""
    attempt = state.attempt
    if attempt is None or not attempt.nodes or state.run is None or state.run.name != attempt.run:
        return None
    steps = _last_step_asked(state, attempt)
    if steps is None or (attempt.last_step or 0) > steps:  # a trainer that goes on past the step that it announced
        return None
    final = [
        known
        for known in reachable_checkpoints(state, attempt.run)
        if known.checkpoint.step >= steps and not known.checkpoint.nodes  # a snapshot is gone with its node
    ]
    start = attempt.checkpoint.step if attempt.checkpoint else 0
    seen = max(start, attempt.last_step or 0)
    if seen < steps and all(known.verified is False for known in final):
        return None
    standing, why = _standing(attempt, final, now, policy)
    if standing is Standing.SOUND and steps - seen > _UNSEEN_STEPS:
        standing = Standing.DOUBT
        why = f"no telemetry of steps {seen + 1} to {steps} has arrived, so nobody has seen their loss"
    return End(step=steps, standing=standing, why=why, good=_last_good(state, attempt, seen))


def awaits_verdict(state: State, now: float, policy: Policy) -> bool:
    """Whether the last step is trained and its checkpoint is still to be judged: nothing is started meanwhile."""
    end = end_of_training(state, now, policy)
    return end is not None and end.standing is Standing.WAITS


def _last_step_asked(state: State, attempt: Attempt) -> int | None:
    """The last step that the trainer says it will train; of an earlier attempt of this run if this one said nothing."""
    said = [each.steps for each in state.attempts.values() if each.run == attempt.run and each.steps is not None]
    return attempt.steps if attempt.steps is not None else next(reversed(said), None)


def _standing(attempt: Attempt, final: list[KnownCheckpoint], now: float, policy: Policy) -> tuple[Standing, str]:
    if any(known.good for known in final):
        return Standing.SOUND, ""
    ended = attempt.ended_at or 0.0
    unread = [known for known in final if known.verified is None]
    if any(still_waiting(now, max(known.seen_at, ended), policy.final_examine_seconds) for known in unread):
        return Standing.WAITS, ""
    if unhealthy := next((known for known in final if known.verified), None):
        return Standing.DOUBT, unhealthy.why
    if unread:
        minutes = policy.final_examine_seconds / 60
        return Standing.DOUBT, f"its examination did not end within {minutes:.0f} minutes"
    if attempt.live:
        written = still_waiting(now, attempt.last_step_at or 0.0, policy.capacity.leave_seconds)
    else:  # a file system that hides it for a moment shows it
        written = not final and still_waiting(now, ended, policy.examine_seconds)
    if written:
        return Standing.WAITS, ""
    return Standing.LOST, final[0].why if final else "it was never committed"


def _last_good(state: State, attempt: Attempt, seen: int) -> KnownCheckpoint | None:
    """The newest good checkpoint up to the last step whose loss was seen, and before trouble that calls for action."""
    onsets = [
        raised.onset_step - 1
        for raised in state.signals.values()
        if raised.attempt == attempt.name
        and raised.onset_step is not None
        and (raised.tier is Tier.ACT and row(raised.signal).domain is Domain.LOSS)
    ]
    return newest_good(state, attempt.run, min([seen, *onsets]))


def name_last_good(end: End) -> str:
    """The sentence that names the last good checkpoint."""
    if end.good is None:
        return "no checkpoint is verified and healthy"
    return f"the last good checkpoint is that of step {end.good.checkpoint.step}"


def open_end(state: State, name: str, now: float, policy: Policy) -> IncidentOpened | None:
    """The incident of an attempt whose ranks are gone, whose last step is trained, and whose last checkpoint is not
    sound. None: nothing is wrong, or it is not known yet."""
    attempt, end = state.attempt, end_of_training(state, now, policy)
    if attempt is None or attempt.live or end is None:
        return None
    match end.standing:
        case Standing.DOUBT if state.resumed is None:
            failure, detector = FailureClass.LAST_CHECKPOINT, "the examination of the last checkpoint"
            cause = f"the last checkpoint, of step {end.step}, is in doubt: {end.why}; {name_last_good(end)}"
        case Standing.LOST if attempt.leave_at is None and state.resumed is None:
            damaged = any(each.checkpoint.step >= end.step for each in state.checkpoints.values())
            failure = FailureClass.CHECKPOINT_REFUSED if damaged else FailureClass.PROCESS_DEATH
            detector = "an attempt ended without a sound checkpoint of its last step"
            cause = f"attempt {attempt.name} {attempt.outcome} at step {end.step} without its checkpoint: {end.why}"
        case _:
            return None
    good = end.good.checkpoint.step if end.good else None
    return IncidentOpened(
        incident=name,
        failure=failure,
        cause=cause,
        detector=detector,
        attempt=attempt.name,
        nodes=(),
        step_failed=end.step,
        onset_step=None,
        at=attempt.ended_at or now,
        evidence={"last_step": end.step, "last_good_step": good, "why": end.why},
        drill=_drill_behind(state, attempt, end) if failure == FailureClass.LAST_CHECKPOINT else None,
    )


def _drill_behind(state: State, attempt: Attempt, end: End) -> str | None:
    """The drill whose trouble with the loss is what speaks against the last checkpoint."""
    if end.good is None or end.good.checkpoint.step >= end.step:
        return None
    alerts = [raised for raised in state.signals.values() if raised.attempt == attempt.name]
    behind = (drill_behind(state, raised) for raised in alerts if row(raised.signal).domain is not Domain.PROCESS)
    return next((drill for drill in behind if drill is not None), None)


def decide_at_end(
    state: State, incident: Incident, decided: RecoveryDecided, now: float, policy: Policy
) -> RecoveryDecided | None:
    """What is done about an incident, if its attempt may have trained everything. None: that is not known yet.

    Trouble with the loss or the data is answered as anywhere else: what was trained is not what was meant.
    """
    attempt = state.attempt
    if attempt is None or decided.action not in (Action.REPLACE_RANKS, Action.RESTART, Action.HALT, Action.COMPLETE):
        return decided
    meets = incident.attempt == attempt.name or not set(attempt.nodes).isdisjoint(incident.nodes)
    if not meets or not _leaves_training_sound(incident) or (attempt.live and not state.driver.acts):
        return decided
    end = end_of_training(state, now, policy)
    if end is None or end.standing is Standing.LOST:
        return decided
    if end.standing is Standing.WAITS:
        return None
    why = f"all {end.step} steps are trained, and the checkpoint of the last one is sound"
    if end.standing is Standing.DOUBT:
        why = f"all {end.step} steps are trained, but the last checkpoint is in doubt: {end.why}; {name_last_good(end)}"
    return replace(decided, action=Action.COMPLETE, why=why, save_first=False, advice=False)


def _leaves_training_sound(incident: Incident) -> bool:
    if incident.kind == FailureClass.LAST_CHECKPOINT:
        return True
    return row(incident.kind).domain is not Domain.LOSS and incident.kind != FailureClass.SILENT_DATA_CORRUPTION


def completed(state: State, now: float, policy: Policy) -> tuple[int, str] | None:
    """The last step and a remark, if the lineage is complete: all is trained, and nothing that is open speaks against
    it."""
    attempt = state.attempt
    if attempt is None or attempt.live or any(True for _ in _open_questions(state, attempt)):
        return None
    end = end_of_training(state, now, policy)
    if end is None or end.standing in (Standing.WAITS, Standing.LOST):
        return None
    answers = [
        incident
        for incident in state.incidents.values()
        if incident.attempt == attempt.name and incident.decision and incident.decision.action is Action.COMPLETE
    ]
    if end.standing is Standing.DOUBT and not answers:
        return None
    if answers:
        decision = answers[-1].decision
        return end.step, f"{answers[-1].name} {answers[-1].cause}; {decision.why if decision else ''}"
    if attempt.outcome is Outcome.COMPLETED or attempt.stop_why is not None:
        return end.step, ""
    return end.step, f"all {end.step} steps are trained; attempt {attempt.name} {attempt.outcome} after the last one"


def _open_questions(state: State, attempt: Attempt) -> Iterator[Incident]:
    """Incidents of the attempt that are not decided, or whose answer is not to go on from here."""
    for incident in state.incidents.values():
        if incident.attempt != attempt.name or incident.answered or incident.kind == FailureClass.DAEMON_RESTART:
            continue
        if incident.proposal is not None and incident.decision is not None and incident.decision.advice:
            continue  # a person was asked, and it was not done
        action = incident.decision.action if incident.decision else None
        if action in (None, Action.ROLLBACK) or (action is Action.HALT and not _leaves_training_sound(incident)):
            yield incident
