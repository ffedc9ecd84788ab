"""What operators ask for that needs a decision: the next run, from an earlier step or under other settings."""

from __future__ import annotations

from opt_ops.core.events import ChangeRequested, IncidentOpened, RecoveryDecided
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import newest_good
from opt_ops.core.values import Action


def open_request(state: State, name: str, now: float) -> IncidentOpened | None:
    """An operator's change that no incident stands for yet."""
    known = {
        incident.evidence.get("request")
        for incident in state.incidents.values()
        if incident.kind == FailureClass.OPERATOR
    }
    change = next((change for request, change in state.changes.items() if request not in known), None)
    if change is None:
        return None
    attempt = state.attempt
    return IncidentOpened(
        incident=name,
        failure=FailureClass.OPERATOR,
        cause=f"{change.author}: {change.reason}",
        detector="an operator asked",
        attempt=attempt.name if attempt else None,
        nodes=(),
        step_failed=attempt.last_step if attempt else None,
        onset_step=None,
        at=now,
        evidence={"request": change.request, **request_fields(change)},
    )


def request_fields(change: ChangeRequested) -> dict[str, object]:
    """What is asked for, without what is not."""
    asked = {
        "to_step": change.to_step,
        "lr_factor": change.lr_factor,
        "lr": change.lr,
        "settings": list(change.settings) or None,
        "data": list(change.data) or None,
        "skip_batches": change.skip_batches or None,
        "keep_later": change.keep_later or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def decide_request(state: State, incident: Incident) -> RecoveryDecided:
    """Do as the operator asked: back to a step, or on from the newest checkpoint."""
    change = state.changes[str(incident.evidence["request"])]
    back = change.to_step is not None
    known = newest_good(state, state.run.name, change.to_step) if back and state.run else None
    live = state.attempt is not None and state.attempt.live
    return RecoveryDecided(
        incident=incident.name,
        playbook=FailureClass.OPERATOR,
        version=0,
        rung=0,
        action=Action.ROLLBACK if back else Action.RECONFIGURE,
        why=f"{change.author} asked for it",
        checkpoint=known.checkpoint if known else None,
        lr_factor=change.lr_factor,
        settings=change.settings,
        skip_batches=change.skip_batches,
        save_first=not back and live,
    )
