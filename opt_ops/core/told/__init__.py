"""Every event as one sentence, the same wherever a person reads of it."""

from __future__ import annotations

from enum import StrEnum

from opt_ops.core.events import Event, kind_of
from opt_ops.core.state import in_place
from opt_ops.core.state.model import State


class Tense(StrEnum):
    """How an event is told."""

    PAST = "past"  # "saved at 115 and ended 2.00-a0"
    WOULD = "would"  # "would save, then end 2.00-a0"


def told(event: Event, known: State | None = None, tense: Tense = Tense.PAST) -> str:
    """The event as one sentence of at most 160 characters, without a full stop. Untrusted text in it is quoted.

    `known` is the state before the event. Without it the sentence is shorter, never wrong.
    """
    del known, tense
    return in_place.told(event) or kind_of(event).replace("_", " ")
