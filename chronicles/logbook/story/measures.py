"""What each group of entries cost, and how it compares with those before: first, worst, large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from chronicles.logbook.story.groups import Group
from chronicles.logbook.story.items import Item
from chronicles.logbook.story.model import CROWDED
from chronicles.logbook.story.stops import Stop, Stops

_WORSE = 1.5  # times the worst one before: less is no news
_LONG = 600.0  # seconds of standstill that are always told
_UNUSUAL = 2.0  # times the median standstill of its class


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Of a group of entries."""

    kind: str  # the class that it counts as
    steps_lost: int | None
    seconds_down: float | None
    first: bool
    worst: bool
    unusual: bool  # a long standstill for its class
    again: tuple[str, int] | None  # a node of it that had failed before, and the how many-th time this is
    longest: float  # seconds of its longest stop
    large: bool


def measured(groups: Sequence[Group], stops: Stops) -> list[Measure]:
    """One for each group, in order. Every stop is counted in exactly one group."""
    owners = _owners(groups, stops)
    own: list[list[Stop]] = [[] for _ in groups]
    for stop, owner in owners.items():
        own[owner].append(stops.all[stop])
    longest = [max((stop.seconds for stop in each), default=0.0) for each in own]
    usual = _usual(groups, longest)
    found: list[Measure] = []
    crowded = sum(item.row is not None for group in groups for item in group.items) > CROWDED
    oftenest = 2  # times that a node had failed
    seen: dict[str, tuple[int, float]] = {}  # the worst so far
    failures: Counter[str] = Counter()
    for place, group in enumerate(groups):
        steps, seconds = _cost(group, own[place])
        kind = kind_of(group)
        before = seen.get(kind)
        nodes = _failed_nodes(group)
        failures.update(nodes)
        again = next(((node, failures[node]) for node in sorted(nodes) if failures[node] > 1), None)
        record = again is not None and again[1] > oftenest
        oftenest = max(oftenest, again[1] if again else 0)
        worst = before is not None and _is_worse(before, steps, longest[place])
        unusual = longest[place] > min(_LONG, _UNUSUAL * usual.get(kind, _LONG))
        plainly = any(item.is_plainly_large for item in group.items)
        found.append(
            Measure(
                kind=kind,
                steps_lost=steps,
                seconds_down=seconds,
                first=before is None,
                worst=worst,
                unusual=unusual,
                again=again,
                longest=longest[place],
                large=before is None or worst or unusual or plainly or (record if crowded else again is not None),
            )
        )
        old_steps, old_seconds = before or (0, 0.0)
        seen[kind] = max(old_steps, steps or 0), max(old_seconds, longest[place])
    return found


def _usual(groups: Sequence[Group], longest: Sequence[float]) -> dict[str, float]:
    """By class, the median standstill."""
    by_kind: dict[str, list[float]] = {}
    for group, seconds in zip(groups, longest, strict=True):
        if seconds:
            by_kind.setdefault(kind_of(group), []).append(seconds)
    return {kind: median(seconds) for kind, seconds in by_kind.items()}


def _failed_nodes(group: Group) -> set[str]:
    """The nodes that its failures are held against; of a drill none."""
    rows = [item.row for item in group.items if item.row is not None and not item.drill]
    return {node for row in rows if row.is_failure for node in row.nodes}


def kind_of(group: Group) -> str:
    """The class that a group counts as: that of its gravest entry, which is the one it is told by."""
    lead = leading(group.items)
    how = " drill" if lead.drill else " on a spare" if lead.is_spare else " alert" if lead.is_alert else ""
    return f"{lead.failure}{how}"


def leading(items: Sequence[Item]) -> Item:
    """The entry that a group is told by: a change of settings, a halt, else the one that began it."""
    for grave in (
        lambda item: item.changes_settings,
        lambda item: item.is_halt,
        lambda item: item.row is not None and item.stop is not None,
    ):
        found = next((item for item in items if grave(item)), None)
        if found is not None:
            return found
    return next((item for item in items if item.row is not None), items[0])


def _is_worse(before: tuple[int, float], steps: int | None, seconds: float | None) -> bool:
    worst_steps, worst_seconds = before
    return bool(
        (worst_seconds and (seconds or 0.0) >= _WORSE * worst_seconds)
        or (worst_steps and (steps or 0) >= _WORSE * worst_steps and (steps or 0) - worst_steps >= 10)
    )


def _owners(groups: Sequence[Group], stops: Stops) -> dict[int, int]:
    """By stop, the group that it is counted in: the one with its first entry, else the newest before its end."""
    owners: dict[int, int] = {}
    for incidents_only in (True, False):
        for place, group in enumerate(groups):
            for item in group.items:
                if item.stop is not None and (item.row is not None or not incidents_only):
                    owners.setdefault(item.stop, place)
    for number, stop in enumerate(stops.all):
        if number not in owners and groups:
            owners[number] = max((place for place, group in enumerate(groups) if group.ts <= stop.end), default=0)
    return owners


def _cost(group: Group, stops: Sequence[Stop]) -> tuple[int | None, float | None]:
    if stops:
        return sum(stop.steps_discarded for stop in stops), sum(stop.seconds for stop in stops)
    harmless = any(item.row is not None and item.row.closed is not None for item in group.items)
    return (0, 0.0) if harmless else (None, None)
