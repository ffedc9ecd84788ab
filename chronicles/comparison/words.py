"""The sentences and rows of a comparison, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from chronicles.comparison.build import Comparison, Cost
from chronicles.comparison.scored import Scored
from chronicles.evaluations import called, measured_by
from chronicles.wording import percent, score, whole
from opt_ops.core.text import duration


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """What both have measured, as plain text. Names are untrusted."""

    name: str
    by: str
    step: str
    a: str
    b: str
    difference: str
    judged: str


ABOUT_SCORES = (
    "Scores behind the common ancestor, at the same or the nearest step. SE: standard errors of the difference; more "
    "than three are more than noise."
)


def head(compared: Comparison) -> str:
    """Who comes from where."""
    a, b = compared.lineages
    common = compared.common
    if common is None:
        return f"Lineages {a} and {b} have no common ancestor."
    of = common.run.partition(".")[0]
    step = whole(common.step)
    if of == a:
        return f"Lineage {b} goes on from step {step} of {common.run}."
    if of == b:
        return f"Lineage {a} goes on from step {step} of {common.run}."
    return f"Lineages {a} and {b} part at step {step} of {common.run}."


def verdict(compared: Comparison) -> str:
    """Which is better, in one or two sentences."""
    found = compared.verdict
    a, b = compared.lineages
    if found.difference is None or found.step is None:
        after = f" behind step {whole(compared.common.step)}" if compared.common else ""
        return f"Nothing can be compared yet: there is no step{after} that both have made."
    one = found.steps == 1
    over = (
        f"in the last {'common step' if one else f'{whole(found.steps)} common steps'}, up to step {whole(found.step)}"
    )
    if not found.difference and not found.noise:
        return f"The losses are the same {over}."
    size = f"{abs(found.difference):.4f}"
    if found.noise is None:
        return f"Too little to judge by: the loss differs by {size} {over}."
    noise = f"{found.noise:.4f}"
    if found.better is None:
        twice = f"{2 * found.noise:.4f}"
        return f"No lineage is better: the mean loss differs by {size} {over}, and twice the noise is {twice}."
    other = b if found.better == a else a
    return (
        f"Lineage {found.better} is better: its mean loss is {size} below that of {other} {over}; the noise is {noise}."
    )


def cost_rows(compared: Comparison) -> Sequence[tuple[str, str, str]]:
    """What each has cost: name, and a text for each lineage. What neither knows is left out."""
    currency = compared.currency
    rows: list[tuple[str, Callable[[Cost], Any], Callable[[Any], str]]] = [
        ("wall clock", lambda cost: cost.wall_seconds, duration),
        ("goodput", lambda cost: cost.goodput, percent),
        ("node-hours", lambda cost: cost.node_hours, lambda hours: f"{hours:,.2f}"),
        ("steps taken back", lambda cost: cost.steps_taken_back, whole),
        ("calls", lambda cost: cost.calls, whole),
        ("people's time", lambda cost: cost.person_seconds, duration),
        ("kWh", lambda cost: cost.kwh, lambda kwh: f"{kwh:,.1f}"),
        ("t CO2e", lambda cost: cost.tco2e, lambda tonnes: f"{tonnes:,.3f}"),
        (f"cost, {currency}", lambda cost: cost.cost, lambda money: f"{money:,.2f}"),
    ]
    found: list[tuple[str, str, str]] = []
    for name, of, told in rows:
        values = [of(cost) for cost in compared.cost]
        if any(value is not None for value in values):
            a, b = ("–" if value is None else told(value) for value in values)
            found.append((name, a, b))
    return found


def score_rows(compared: Comparison) -> Iterator[ScoreRow]:
    """What both have measured."""
    for each in compared.scores:
        a, b = (score(value, error) for value, error in zip(each.value, each.stderr, strict=True))
        same = each.step[0] == each.step[1]
        yield ScoreRow(
            name=called(each.pair[0]),
            by=measured_by(each.pair[0]),
            step=whole(each.step[0]) if same else f"{whole(each.step[0])} and {whole(each.step[1])}",
            a=a,
            b=b,
            difference=f"{'+' if each.difference >= 0 else '−'}{score(abs(each.difference))}",
            judged=_judged(each),
        )


def _judged(each: Scored) -> str:
    if each.errors is None:
        return "not known: a standard error is missing"
    size = f" ({abs(each.errors):.1f} SE)" if isfinite(each.errors) else ""
    if not each.certain:
        return f"no more than noise{size}"
    return f"{each.better} is better{size}" if each.better is not None else f"more than noise{size}"


def plain(value: Any) -> str:
    """A setting's value as text; a dash where the lineage has none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
