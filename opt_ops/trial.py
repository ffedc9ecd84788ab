"""What would have been done differently under other playbooks: a past journal's decisions, made once more.

Every decision of the journal is asked for again, on the state that it was made on. What would have followed from
another decision is not known, so each is compared by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from opt_ops.core.decide import decide_recovery
from opt_ops.core.events import Entry, RecoveryDecided
from opt_ops.core.fold import fold
from opt_ops.core.policy import Policy
from opt_ops.core.run import State


@dataclass(frozen=True, slots=True)
class Compared:
    """A decision as it was made, and as it would be made; None: not at that moment."""

    was: RecoveryDecided
    would_be: RecoveryDecided | None

    @property
    def differs(self) -> bool:
        """Whether something else would be done. Versions and wordings do not count."""
        return self.would_be is None or _doing(self.was) != _doing(self.would_be)


def decisions(entries: Iterable[Entry], policy: Policy) -> Iterator[Compared]:
    """Every decision of a playbook in the journal, beside that of `policy`."""
    state = State()
    for entry in entries:
        event = entry.event
        if isinstance(event, RecoveryDecided) and event.playbook != "operator":
            again = decide_recovery(state, entry.ts, policy)
            yield Compared(event, again if isinstance(again, RecoveryDecided) else None)
        state = fold(state, entry)


def described(decision: RecoveryDecided | None) -> str:
    """In a few words, for a table."""
    if decision is None:
        return "nothing yet"
    words = [f"{decision.action} ({decision.playbook}, rung {decision.rung + 1})"]
    if decision.checkpoint is not None:
        words.append(f"to {decision.checkpoint.step}")
    if decision.lr_factor is not None:
        words.append(f"lr × {decision.lr_factor}")
    if decision.exclude:
        words.append(f"without {', '.join(decision.exclude)}")
    return ", ".join(words)


def _doing(decision: RecoveryDecided) -> tuple[object, ...]:
    return (
        decision.action,
        decision.checkpoint,
        decision.lr_factor,
        decision.exclude,
        decision.skip_batches,
        decision.save_first,
    )
