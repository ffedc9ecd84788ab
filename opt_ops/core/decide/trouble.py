"""What was tried before for the same trouble with the loss, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from opt_ops.core.decide.retry_budget import failure_step, spends_budget
from opt_ops.core.events import RecoveryDecided
from opt_ops.core.failures.classes import Domain, FailureClass, row
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action

_NEAR_STEPS = 512  # from an onset to the end of its attempt: one trouble
_SAME_BATCHES = 2  # by which the onsets of one batch may differ: telemetry says it to the line


class Data(StrEnum):
    """On which data trouble came again."""

    SAME = "same"
    NEXT = "next"  # right behind the batches that were skipped for it
    OTHER = "other"


def about_loss(kind: str) -> bool:
    """Whether a failure class, or a signal, is trouble with the loss that has one of the causes."""
    return row(kind).domain is Domain.LOSS or kind in (FailureClass.UNPLANNED_LR, FailureClass.SILENT_DATA_CORRUPTION)


def onset_of(state: State, incident: Incident) -> Mapping[str, Any]:
    """The digest of telemetry around an incident's onset; empty where none was made."""
    raised = state.signals.get(incident.signal or "")
    if raised is not None and raised.onset:
        return raised.onset
    return newest_onset(state, incident.attempt, incident.step_failed)


def newest_onset(state: State, attempt: str | None, step: int | None) -> Mapping[str, Any]:
    """The newest digest of an attempt shortly before a step: a rank may end before the finding that has one acts."""
    of_attempt = [raised.onset for raised in state.signals.values() if raised.attempt == attempt and raised.onset]
    near = [each for each in of_attempt if step is None or 0 <= step - each["step"] <= _NEAR_STEPS]
    return near[-1] if near else {}


def earlier_tries(state: State, here: int, settle_steps: int | None, without: str = "") -> list[Incident]:
    """Earlier incidents with the loss whose answer was a new start, and that training has not left behind since.

    Args:
        state: The lineage.
        here: The step of the new trouble.
        settle_steps: Training this far past a failure counts as cured; None: it is cured at once.
        without: The incident that asks.
    """
    if settle_steps is None:
        return []
    return [
        other
        for other in state.incidents.values()
        if other.name != without
        and about_loss(other.kind)
        and spends_budget(other)
        and other.decision is not None
        and other.decision.action in (Action.ROLLBACK, Action.RESTART)
        and here <= failure_step(state, other) + settle_steps
    ]


def data_of(earlier: Mapping[str, Any], decision: RecoveryDecided | None, later: Mapping[str, Any]) -> Data | None:
    """On which data trouble came again, by the two digests and by what was skipped between them; None: not known."""
    was, now = earlier.get("data", {}).get("batch"), later.get("data", {}).get("batch")
    if was is None or now is None:
        return None
    ends = [skip.last for skip in decision.skips] if decision is not None else []
    if any(0 < now - last <= _SAME_BATCHES for last in ends):
        return Data.NEXT
    return Data.SAME if abs(now - was) <= _SAME_BATCHES else Data.OTHER


def changes_state(decision: RecoveryDecided) -> bool:
    """Whether what was tried lets the model come to the same batch in another state."""
    return decision.lr_factor is not None or bool(decision.settings) or bool(decision.exclude)


def remedy(decision: RecoveryDecided | None) -> str | None:
    """What was done, in words of benchmarks and reports, such as `rollback+skip`; None: nothing was touched."""
    if decision is None or decision.advice:
        return None
    if decision.action not in (Action.ROLLBACK, Action.RESTART, Action.RECONFIGURE):
        return None
    base = "older checkpoint" if decision.refuses is not None else str(decision.action)
    parts = {
        "lr": decision.lr_factor is not None,
        "skip": bool(decision.skips) or decision.skip_batches > 0,
        "settings": bool(decision.settings),
        "exclude": bool(decision.exclude),
    }
    return "+".join([base, *(name for name, there in parts.items() if there)])


def described(decision: RecoveryDecided) -> str:
    """What was tried, for people: `rollback to step 300, learning rate × 0.75`."""
    step = decision.checkpoint.step if decision.checkpoint else 0
    words = [f"{decision.action} to step {step}" if decision.action is Action.ROLLBACK else str(decision.action)]
    if decision.refuses is not None:
        words.append(f"without the checkpoint of step {decision.refuses.step}")
    if decision.lr_factor is not None:
        words.append(f"learning rate × {decision.lr_factor:g}")
    words += decision.settings
    words += [f"batches {skip.first} to {skip.last} skipped" for skip in decision.skips]
    if decision.skip_batches:
        words.append(f"{decision.skip_batches} batches skipped")
    if decision.exclude:
        words.append(f"without {', '.join(decision.exclude)}")
    return ", ".join(words)
