"""What a dry run prints: a line for each thing that would happen, and its cost. JSON: `opt-ops/foreseen/1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opt_ops.cli.shared.output import Column, Format, show
from opt_ops.core.codec import encode
from opt_ops.core.events import Event, kind_of
from opt_ops.core.state.model import State
from opt_ops.core.text import duration, printable
from opt_ops.core.told import Tense, foreseen, told
from opt_ops.core.told.phrase import count

_VERB = 6  # columns of a verb: `save`, `end`, `begin`


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """Something that would happen.

    Attributes:
        kind: An event's kind, or another word where no event stands for it.
        text: The whole sentence.
        fields: Of the event.
        lines: Verb and rest of each line that people read; none where another line says it already.
    """

    kind: str
    text: str
    fields: Mapping[str, Any]
    lines: tuple[tuple[str, str], ...]

    def row(self) -> dict[str, Any]:
        """For programs."""
        return {"kind": self.kind, "text": self.text, "fields": self.fields}


def of_event(event: Event, known: State, lines: Sequence[tuple[str, str]] | None = None) -> Foreseen:
    """An event that would be journaled; `lines` None: the one that tells it."""
    fields = {name: value for name, value in encode(event).items() if name != "kind"}
    shown = (foreseen(event, known),) if lines is None else tuple(lines)
    return Foreseen(kind=kind_of(event), text=told(event, known, Tense.WOULD), fields=fields, lines=shown)


def thing(kind: str, verb: str, rest: str, fields: Mapping[str, Any] | None = None) -> Foreseen:
    """Something for which no event stands."""
    return Foreseen(kind=kind, text=f"would {verb} {rest}", fields=fields or {}, lines=((verb, rest),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Steps that would be discarded, and what they have cost; `steps` None: not known, and `unknown` says what."""

    steps: int | None = 0
    seconds: float | None = None
    nodes: int = 0
    since: str = ""
    unknown: str = ""

    @property
    def node_hours(self) -> float | None:
        """What the steps have taken of the cluster; None if their pace is not known."""
        return None if self.seconds is None else self.nodes * self.seconds / 3600

    @property
    def text(self) -> str:
        """`2,240 steps (13 h 1 min of 124 nodes, 1,614 node-hours)`."""
        if self.steps is None:
            return f"{self.unknown}: that is known afterwards"
        if not self.steps:
            return "nothing that is trained"
        steps = count(self.steps, "step")
        hours = self.node_hours
        if self.seconds is None or hours is None:
            return f"{steps}{self.since}"
        spent = f"{hours:.3g}" if hours < 100 else f"{hours:,.0f}"
        return f"{steps}{self.since} ({duration(self.seconds)} of {count(self.nodes, 'node')}, {spent} node-hours)"

    def row(self) -> dict[str, Any]:
        """For programs."""
        numbers = {"steps": self.steps, "seconds": self.seconds, "node_hours": self.node_hours}
        if self.steps == 0:
            numbers = {"steps": 0, "seconds": 0.0, "node_hours": 0.0}
        return {"kind": "cost", "text": f"would lose {self.text}", **numbers}


NOTHING = Loss()
FAULT = Loss(steps=None, unknown="what the fault costs")
WHILE_SAVING = Loss(steps=None, unknown="the steps that are trained while that checkpoint is written")


def show_foreseen(coming: Sequence[Foreseen], loss: Loss, form: Format) -> None:
    """Print what would happen, and last what it would cost."""
    if form not in (Format.TABLE, Format.WIDE):
        rows = [*(each.row() for each in coming), loss.row()]
        show("opt-ops/foreseen/1", rows, [Column("KIND", "kind")], form)
        return
    for verb, rest in [*(line for each in coming for line in each.lines), ("lose", loss.text)]:
        print(printable(f"would {verb:<{_VERB}}  {rest}".rstrip()))
