"""Every event as one sentence, the same wherever a person reads of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from opt_ops.core.events import Event
from opt_ops.core.state.model import State
from opt_ops.core.told import evaluation, execution, incidents, operator, watch
from opt_ops.core.told.phrase import LONGEST, Forms, clean, cut


class Tense(StrEnum):
    """How an event is told."""

    PAST = "past"  # "saves, then ends 2.00-a0"
    WOULD = "would"  # "would save, then end 2.00-a0"


RULES: Mapping[type[Event], Callable[[Any, State | None], Forms]] = {
    **operator.RULES,
    **execution.RULES,
    **incidents.RULES,
    **watch.RULES,
    **evaluation.RULES,
}
"""By kind of event. A test demands one for every kind."""


def told(event: Event, known: State | None = None, tense: Tense = Tense.PAST) -> str:
    """The event as one sentence of at most 160 characters, without a full stop. Untrusted text in it is quoted.

    `known` is the state before the event. Without it the sentence is shorter, never wrong.
    """
    forms = RULES[type(event)](event, known)
    if tense is Tense.PAST:
        return cut(clean(forms.past), LONGEST)
    comma = "," if forms.rest.startswith("then ") else ""
    return cut(clean(f"would {forms.verb}{comma} {forms.rest}"), LONGEST)


def foreseen(event: Event, known: State | None = None) -> tuple[str, str]:
    """The verb and the rest of what would happen: `end`, `2.00-a0 on n1, n2`. For the layout of a dry run."""
    forms = RULES[type(event)](event, known)
    return forms.verb, cut(clean(forms.rest), LONGEST)
