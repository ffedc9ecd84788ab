"""What later steps show about an incident that is over: whether what was tried cured it, and whether it was needed."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.proof import planned_lr
from opt_ops.core.decide.retry_budget import failure_step
from opt_ops.core.decide.trouble import Data, about_loss, data_of, described, earlier_tries, onset_of
from opt_ops.core.events import AfterthoughtAdded, Event
from opt_ops.core.failures.classes import FailureClass, title
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action, Tier

_SAME_STEPS = 10  # two spikes whose onsets are so close are one spike that came again


class Topic(StrEnum):
    """What an afterthought is about; an incident has one of each at most."""

    CAME_AGAIN = "came_again"
    CURED = "cured"
    NOT_NEEDED = "not_needed"


def add_afterthought(state: State, now: float, policy: Policy) -> Event | None:
    """Add to an old incident what has become known since: that it came again, what cured it, what was not needed."""
    for number, incident in enumerate(state.incidents.values()):
        decision = incident.decision
        if decision is None or decision.action is not Action.ROLLBACK or not incident.acted_on:
            continue
        if incident.closed_at is None or incident.drill is not None or not about_loss(incident.kind):
            continue
        known = {each.topic for each in incident.afterthoughts}
        for topic, text in _thoughts(state, incident, number, policy):
            if topic not in known:
                return AfterthoughtAdded(incident=incident.name, topic=topic, text=text)
    return None


def _thoughts(state: State, incident: Incident, number: int, policy: Policy) -> Iterator[tuple[Topic, str]]:
    playbook = policy.playbooks.get(incident.kind)
    settle = playbook.budget.settle_steps if playbook else None
    if incident.decision is None or settle is None:
        return
    later = [each for each in list(state.incidents.values())[number + 1 :] if about_loss(each.kind)]
    settled = failure_step(state, incident) + settle
    again = next((i for i in later if i.drill is None and (i.onset_step or failure_step(state, i)) <= settled), None)
    if again is not None:
        yield Topic.CAME_AGAIN, _came_again(state, incident, again)
        return
    last = (state.attempt.last_step or 0) if state.attempt else 0
    here = incident.onset_step or failure_step(state, incident)
    tries = [each for each in earlier_tries(state, here, settle, incident.name) if each.opened_at < incident.opened_at]
    if tries and last > settled:
        failed = "; ".join(f"{each.name}: {described(each.decision)} → failed" for each in tries if each.decision)
        yield Topic.CURED, f"{described(incident.decision)} → cured, as steps up to {last} show. Tried before: {failed}"
    if incident.decision.lr_factor is not None and (healed := _healed(state, incident, policy)) is not None:
        yield Topic.NOT_NEEDED, _not_needed(state, incident, healed)


def _came_again(state: State, incident: Incident, again: Incident) -> str:
    assert incident.decision is not None
    data = data_of(onset_of(state, incident), incident.decision, onset_of(state, again))
    where = {Data.SAME: " on the same data", Data.NEXT: " on the data right behind it", Data.OTHER: " on other data"}
    step = again.onset_step if again.onset_step is not None else again.step_failed
    what = title(again.kind).lower()
    return (
        f"tried: {described(incident.decision)} → {what} again at step {step}"
        f"{where[data] if data is not None else ''}; see {again.name}"
    )


def _healed(state: State, incident: Incident, policy: Policy) -> int | None:
    """The step at which the spike came again in the run after the rollback, if it healed there."""
    following = state.attempts.get(incident.next_attempt or "")
    if following is None or incident.onset_step is None or incident.kind != FailureClass.LOSS_SPIKE:
        return None
    for raised in state.signals.values():
        attempt = state.attempts.get(raised.attempt)
        spike = raised.signal == FailureClass.LOSS_SPIKE and raised.tier is Tier.ALERT and raised.onset_step is not None
        if not spike or attempt is None or attempt.run != following.run or raised.onset_step is None:
            continue
        same = abs(raised.onset_step - incident.onset_step) <= _SAME_STEPS
        if same and (attempt.last_step or 0) > raised.onset_step + 4 * policy.spike.heal_steps:
            return raised.onset_step
    return None


def _not_needed(state: State, incident: Incident, healed: int) -> str:
    assert incident.decision is not None
    attempt, lineage = state.attempt, state.intent.lineage
    text = f"the spike came again at step {healed} and healed by itself: the cut of the learning rate was not needed"
    plan = planned_lr(state, attempt) if attempt is not None else None
    lr = plan.at((attempt.last_step or 0) + 1) if plan is not None and attempt is not None else None
    if not lr or not incident.decision.lr_factor:
        return text
    return f"{text}. This takes it back: opt-ops run set {lineage} lr={lr / incident.decision.lr_factor:.6g}"
