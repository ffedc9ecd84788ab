"""Probes: before a rollback whose cause is in doubt, short runs on idle nodes try what the causes would predict.

The run itself has shown once what its data does to its state. So the first idle node tries other data, the second one
the same data again, the third one a lower learning rate. A probe trains from a sound checkpoint before the onset until
some steps past it. Where nothing can be learnt by the deadline nothing is begun, and what has shown nothing by then
counts for nothing: the ladder goes on as without probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from opt_ops.core.decide.capacity import eligible_nodes
from opt_ops.core.decide.cures import choose_rung, skipped_around
from opt_ops.core.decide.incidents import causes_of
from opt_ops.core.decide.next_run import settings_after
from opt_ops.core.decide.policy import Playbook, Policy, ProbeRule
from opt_ops.core.decide.trouble import about_loss, onset_of
from opt_ops.core.detect.point import Point
from opt_ops.core.events import Event, ProbeEnded, ProbesIntended, ProbesJudged, RecoveryDecided
from opt_ops.core.events.probes import Probe, ProbeKind
from opt_ops.core.failures.causes import Suspicion
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import probing, reachable_checkpoints, waiting_for_attempt
from opt_ops.core.values import Action, Checkpoint, Skip
from opt_ops.core.waiting import still_waiting

CERTAIN = 0.9
"""The confidence from which a cause needs no test. Below it, of ten cures chosen so, one or more is the wrong one."""

ORDER = (ProbeKind.OTHER_DATA, ProbeKind.SAME_DATA, ProbeKind.LOWER_LR)
"""Which probes are made where there are fewer idle nodes than probes."""

_STANDS_OUT = 4.0  # times the noise before the onset
_SHARE = 0.25  # of the run's own rise, at least: what a probe must show, too
_IN_A_ROW = 3  # points whose median says that it is no single odd one


def intend_probes(state: State, now: float, policy: Policy) -> Event | None:
    """Begin probes for an incident that is worth it, once."""
    if state.ended or not state.driver.acts or state.paused is not None:
        return None
    for incident in (state.incidents[name] for name in state.open_incidents):
        attempt = state.attempt
        if incident.decision is not None or incident.probes is not None or incident.drill is not None:
            continue
        playbook = policy.playbooks.get(incident.kind)
        if playbook is None or playbook.probe is None or attempt is None or attempt.name != incident.attempt:
            continue
        if not _interrupted(state, incident) and (begun := _plan(state, incident, attempt, playbook, now, policy)):
            return begun
    return None


def judge_probes(state: State, now: float, policy: Policy) -> Event | None:
    """End the wait for probes: all have ended, the deadline is over, or something else goes first."""
    if state.ended:
        return None
    for incident in (state.incidents[name] for name in state.open_incidents):
        if not probing(incident) or incident.probes is None:
            continue
        over = len(incident.probe_ends) >= len(incident.probes.probes)
        late = not still_waiting(now, incident.probes.at, incident.probes.deadline_seconds)
        other = _interrupted(state, incident)
        if over or late or other:
            why = other or ("all probes have ended" if over else "the deadline for probes is over")
            return ProbesJudged(incident=incident.name, causes=_causes(state, incident, policy), why=why)
    return None


def verdict(intended: ProbesIntended, probe: Probe, points: Sequence[Point]) -> ProbeEnded | None:
    """What the telemetry of a probe shows; None: it does not show anything yet."""
    since = [point for point in points if point.step >= intended.onset_step]
    losses: list[float] = []
    for point in since:
        if point.skip is None and (point.loss is None or not point.finite):
            return _ended(intended, probe, True, point.step, f"the loss is not finite at step {point.step}")
        losses += [] if point.loss is None or point.skip is not None else [point.loss]
        level = median(losses[-_IN_A_ROW:]) if len(losses) >= _IN_A_ROW else -math.inf
        if intended.limit is not None and level > intended.limit:
            return _ended(
                intended, probe, True, point.step, f"loss {level:.3f} at step {point.step}, above {intended.limit:.3f}"
            )
    if len(losses) < _IN_A_ROW or since[-1].step < intended.last_step:
        return None
    highest = f"loss {max(losses):.3f} at most in steps {since[0].step} to {since[-1].step}"
    return _ended(intended, probe, False, since[-1].step, highest)


def died(intended: ProbesIntended, probe: Probe, points: Sequence[Point]) -> ProbeEnded:
    """A probe whose processes have ended, and that has shown nothing."""
    step = points[-1].step if points else None
    return _ended(intended, probe, None, step, "its processes ended before it showed anything")


def _ended(intended: ProbesIntended, probe: Probe, spiked: bool | None, step: int | None, why: str) -> ProbeEnded:
    return ProbeEnded(incident=intended.incident, probe=probe.kind, spiked=spiked, step=step, why=why)


def _interrupted(state: State, incident: Incident) -> str:
    """Why the decision must not wait for probes any more; empty: it may."""
    attempt = state.attempt
    if incident.answered:
        return "an operator has decided"
    if attempt is None or attempt.name != incident.attempt:
        return "a newer attempt has begun"
    if not state.driver.acts or state.paused is not None:
        return "an operator drives, or pauses the lineage"
    if any(other.next_attempt != attempt.name for other in waiting_for_attempt(state)):
        return "another incident needs a new attempt"
    return ""


def _causes(state: State, incident: Incident, policy: Policy) -> tuple[Suspicion, ...]:
    """The causes, now that probes have shown what they have."""
    spiked = {str(each.probe): each.spiked for each in incident.probe_ends if each.spiked is not None}
    raised = state.signals.get(incident.signal or "")
    return causes_of(state, raised, policy, spiked) if raised is not None and spiked else incident.causes


def _plan(
    state: State, incident: Incident, attempt: Attempt, playbook: Playbook, now: float, policy: Policy
) -> ProbesIntended | None:
    rule, onset = playbook.probe, onset_of(state, incident)
    first = onset.get("step", incident.onset_step)
    if rule is None or first is None or not about_loss(incident.kind) or "data" not in onset:
        return None
    if any(each.confidence >= CERTAIN for each in incident.causes) or (limit := _limit(onset, incident, rule)) is None:
        return None
    if (chosen := choose_rung(state, incident, playbook, now, policy).rung) is None:
        return None
    idle = [name for name in eligible_nodes(state, policy, now) if name not in attempt.nodes]
    checkpoint = _before(state, attempt, first - max(1, incident.margin_steps))
    last = min(first + rule.steps - 1, attempt.steps or math.inf)
    if chosen.action is not Action.ROLLBACK or not idle or checkpoint is None or last < first + _IN_A_ROW:
        return None
    seconds = (last - checkpoint.step) * _step_seconds(attempt)
    if seconds > rule.deadline_seconds:
        return None
    probes = tuple(_probes(state, incident, playbook, checkpoint, idle))
    return ProbesIntended(
        incident=incident.name,
        attempt=attempt.name,
        checkpoint=checkpoint,
        onset_step=first,
        last_step=int(last),
        limit=None if math.isinf(limit) else limit,
        at=now,
        deadline_seconds=rule.deadline_seconds,
        probes=probes,
        why=f"no cause is certain ({_likeliest(incident)}), and {len(idle)} fit nodes are idle",
    )


def _likeliest(incident: Incident) -> str:
    return ", ".join(f"{each.cause} {each.confidence:.0%}" for each in incident.causes[:2]) or "none is likely"


def _limit(onset: Mapping[str, Any], incident: Incident, rule: ProbeRule) -> float | None:
    """The loss above which a probe has spiked; None: the run's own rise would not show in so few steps.

    The rise must stand out at once, or the finding was acted on within the steps of a probe.
    """
    loss = onset.get("loss", {})
    if not loss.get("finite", True):
        return math.inf if "before" not in loss else loss["before"] + _STANDS_OUT * loss["noise"]
    if "before" not in loss:
        return None
    soon = (incident.step_failed or math.inf) - onset.get("step", 0) <= rule.steps
    rise, least = (loss["top"] if soon else loss["first"]) - loss["before"], _STANDS_OUT * loss["noise"]
    return loss["before"] + max(least, rise * _SHARE) if rise > least else None


def _before(state: State, attempt: Attempt, step: int) -> Checkpoint | None:
    """The newest sound checkpoint at or before a step that any node can read."""
    known = (each for each in reachable_checkpoints(state, attempt.run) if each.good and not each.checkpoint.nodes)
    sound = (each.checkpoint for each in known if each.checkpoint.step <= step)
    return max(sound, key=lambda checkpoint: checkpoint.step, default=None)


def _step_seconds(attempt: Attempt) -> float:
    """How long a step takes on one node: as the attempt's, times its nodes. 0: it is not known."""
    first, last = attempt.first_step_at, attempt.last_step_at
    steps = (attempt.last_step or 0) - (attempt.first_step or 0)
    return (last - first) / steps * len(attempt.nodes) if first is not None and last is not None and steps > 0 else 0.0


def _probes(
    state: State, incident: Incident, playbook: Playbook, checkpoint: Checkpoint, idle: Sequence[str]
) -> Iterator[Probe]:
    cut = next((rung.lr_factor for rung in playbook.ladder if rung.lr_factor is not None), None)
    kinds = [kind for kind in ORDER if cut is not None or kind is not ProbeKind.LOWER_LR]
    for kind, node in zip(kinds, idle, strict=False):
        skips: tuple[Skip, ...] = skipped_around(onset_of(state, incident)) if kind is ProbeKind.OTHER_DATA else ()
        as_cure = RecoveryDecided(
            incident=incident.name,
            playbook=playbook.name,
            version=playbook.version,
            rung=0,
            action=Action.ROLLBACK,
            why="a probe",
            checkpoint=checkpoint,
            skips=skips,
            lr_factor=cut if kind is ProbeKind.LOWER_LR else None,
        )
        after = settings_after(state, incident, as_cure, checkpoint.step)
        yield Probe(kind=kind, node=node, lr_factors=after.lr_factors, settings=after.settings, skips=after.skips)
