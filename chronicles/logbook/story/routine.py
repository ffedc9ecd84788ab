"""How days with routine only are told: what happened how often, and how long each took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.measures import Measure
from chronicles.logbook.story.model import Fold
from chronicles.logbook.story.stops import Stop
from chronicles.logbook.story.words import about, between, days, number_word, plural, tallied
from chronicles.wording import count, short

_DAY = 86400.0


def title(group: Group, measure: Measure, stops: Sequence[Stop]) -> str:
    """`18 November: four bad GPUs and two silent nodes, 1 min 24 s to 1 min 51 s each; seven spares out; 15 steps`."""
    told = (_stops(group.items, stops), *(tell(group.items) for tell in (_spares, _alerts, _evaluated)))
    parts = [part for part in told if part]
    parts += _others(group.items)
    if measure.steps_lost:
        parts.append(count(measure.steps_lost, "step") + " discarded")
    if group.rule is Fold.QUIET and (quiet := _undisturbed(group, stops)) > 1.5 * _DAY:
        parts.append(f"{about(quiet)} without a stop")
    drill = "drills, " if any(item.drill for item in group.items) else ""
    return f"{days(group.items[0].ts, group.items[-1].ts)}: {drill}{'; '.join(parts) or 'nothing of note'}"


def _stops(items: Sequence[Item], stops: Sequence[Stop]) -> str:
    told = tallied(item.failure for item in items if item.row is not None and item.stop is not None)
    if not told:
        return ""
    seconds = [stop.seconds for stop in stops]
    took = f", {between(min(seconds), max(seconds))}{' each' if len(seconds) > 1 else ''}" if seconds else ""
    return f"{told}{took}"


def _spares(items: Sequence[Item]) -> str:
    number = sum(item.is_spare for item in items)
    return f"{plural(number, 'node')} without ranks excluded" if number else ""


def _alerts(items: Sequence[Item]) -> str:
    told = tallied(item.failure for item in items if item.is_alert)
    return f"{told} that needed no action" if told else ""


def _evaluated(items: Sequence[Item]) -> str:
    number = sum(item.is_evaluation for item in items)
    return f"{plural(number, 'checkpoint')} evaluated" if number else ""


def _others(items: Sequence[Item]) -> list[str]:
    rest = [
        item
        for item in items
        if not (
            item.is_spare or item.is_alert or item.is_evaluation or (item.row is not None and item.stop is not None)
        )
    ]
    titles = Counter(short(item.entry.title, 60) for item in rest)
    return [what if number == 1 else f"{what} ({number_word(number)} times)" for what, number in titles.most_common(3)]


def _undisturbed(group: Group, stops: Sequence[Stop]) -> float:
    """The longest time between two stops of the group."""
    times = [group.begin, *(at for stop in stops for at in (stop.begin, stop.end)), group.end]
    return max((later - earlier for earlier, later in zip(times[::2], times[1::2], strict=True)), default=0.0)
