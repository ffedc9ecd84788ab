"""Compares the decisions of a past journal with those that other playbooks would make.

Each decision is made again on the state on which it was made. What would have followed from another decision is not
known, so each decision is compared by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.recovery import decide_recovery
from opt_ops.core.detect.finding import Finding
from opt_ops.core.detect.loss import LossDetector
from opt_ops.core.events import Entry, RecoveryDecided
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.runfolder.telemetry import points

_SAME_FINDING = 5  # steps


@dataclass(frozen=True, slots=True)
class DecisionDiff:
    """A decision as it was made, and as other playbooks would make it; None: they would not decide then."""

    was: RecoveryDecided
    would_be: RecoveryDecided | None

    @property
    def differs(self) -> bool:
        """Whether another action would be taken. Versions and wording do not count."""
        return self.would_be is None or _action(self.was) != _action(self.would_be)


def decisions(entries: Iterable[Entry], policy: Policy) -> Iterator[DecisionDiff]:
    """Yield every decision of a playbook in the journal, beside the decision of `policy`."""
    state = State()
    for entry in entries:
        event = entry.event
        if isinstance(event, RecoveryDecided) and event.playbook != FailureClass.OPERATOR:
            again = decide_recovery(state, entry.ts, policy)
            yield DecisionDiff(event, again if isinstance(again, RecoveryDecided) else None)
        state = fold(state, entry)


def loss_findings(path: Path, state: State, policy: Policy) -> Iterator[tuple[str, Finding]]:
    """Yield the findings of the loss detector in each attempt's telemetry under a policy."""
    for attempt in state.attempts:
        detector = LossDetector(policy.spike, policy.drift)
        for point in points(path / attempt_folder(attempt) / "telemetry.jsonl"):
            yield from ((attempt, finding) for finding in detector.observe(point))


def was_raised(state: State, attempt: str, finding: Finding) -> bool:
    """Whether the journal has the finding, within a few steps: the daemon's detector had also seen earlier attempts."""
    return any(
        signal.attempt == attempt
        and (signal.signal, signal.tier) == (finding.signal, finding.tier)
        and abs((signal.onset_step or 0) - finding.onset_step) <= _SAME_FINDING
        for signal in state.signals.values()
    )


def described(decision: RecoveryDecided | None) -> str:
    """Describe a decision in a few words, for a table."""
    if decision is None:
        return "nothing yet"
    words = [f"{decision.action} ({decision.playbook}, rung {decision.rung + 1})"]
    if decision.checkpoint is not None:
        words.append(f"to {decision.checkpoint.step}")
    if decision.lr_factor is not None:
        words.append(f"lr × {decision.lr_factor}")
    words += [*decision.settings, *(f"skips {skip.first} to {skip.last}" for skip in decision.skips)]
    if decision.exclude:
        words.append(f"excludes {', '.join(decision.exclude)}")
    return ", ".join(words)


def _action(decision: RecoveryDecided) -> tuple[object, ...]:
    return (
        decision.action,
        decision.checkpoint,
        decision.lr_factor,
        decision.exclude,
        decision.skip_batches,
        decision.skips,
        decision.settings,
        decision.refuses,
        decision.save_first,
    )
