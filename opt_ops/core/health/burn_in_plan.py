"""Burn-in of nodes: who is measured with whom, and who is named.

A slow node slows everybody whom it is measured with. So a group that is slow makes suspects of all its nodes, and each
suspect is measured again with a good one, as DLRover's network check does: a node's own speed is that of the best group
that it was in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_high

TOLERANCE = 0.1
"""Slower than the median by more than this share, or than the median deviation where that is more: Megatron's test."""

SHARED = 0.5
"""The same for processors, whose cores others use as well: only a gross difference says something."""

FEW = 6
"""Among so many nodes or more, one of the first pairs holds no slow one, as long as two nodes at most are slow."""

_PARTNERS = 3  # of each, among fewer: one of them is good, as long as two nodes at most are slow

Group = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMeasurement:
    """An all-reduce of a group of nodes. `gbs` None: it failed, or did not end in time."""

    nodes: Group
    gbs: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """Somebody who is slower than the others: its own figure, and the median."""

    name: str
    value: float
    median: float


def slower(values: Mapping[str, float], tolerance: float = TOLERANCE) -> list[Slow]:
    """Those that are slower than most by more than the tolerance; nobody among fewer than three."""
    if len(values) < 3:
        return []
    middle = median_high(values.values())
    spread = median(abs(value - middle) for value in values.values())
    limit = middle - max(spread, tolerance * middle)
    return [Slow(name=name, value=value, median=middle) for name, value in values.items() if value < limit]


def next_round(
    nodes: Sequence[str], rounds: Sequence[Sequence[GroupMeasurement]], tolerance: float = TOLERANCE
) -> list[Group]:
    """The groups, without a node in common, to be measured next; none when it is settled who is slow.

    Up to two slow nodes are found: among fewer than `FEW` nodes by meeting three others each, among more by one round
    and one more for the suspects, or a few where suspects are more than good ones.

    Args:
        nodes: All that take part, without those that have dropped out.
        rounds: What was measured so far, round by round.
        tolerance: By how much a good node may be slower than the best.
    """
    if len(nodes) < FEW:
        wanted = min(_PARTNERS, len(nodes) - 1)
        met = _partners(nodes, rounds)
        return [] if all(len(met[node]) >= wanted for node in nodes) else _tournament(nodes, len(rounds))
    if not rounds:
        return _tournament(nodes, 0)
    return _regrouped(nodes, rounds, tolerance)


def named(
    nodes: Sequence[str], rounds: Sequence[Sequence[GroupMeasurement]], tolerance: float = TOLERANCE
) -> list[Slow]:
    """The slow nodes, after the last round. Of two nodes, nobody can say which."""
    speeds = {node: speed for node, speed in _speeds(nodes, rounds).items() if speed is not None}
    return slower(speeds, tolerance)


def _speeds(nodes: Sequence[str], rounds: Sequence[Sequence[GroupMeasurement]]) -> dict[str, float | None]:
    """Each node's own: that of the best group that it was in, 0 where all failed; None without any."""
    speeds: dict[str, float | None] = dict.fromkeys(nodes)
    for each in (measured for measurements in rounds for measured in measurements):
        for node in speeds.keys() & set(each.nodes):
            speeds[node] = max(speeds[node] or 0.0, each.gbs or 0.0)
    return speeds


def _partners(nodes: Sequence[str], rounds: Sequence[Sequence[GroupMeasurement]]) -> dict[str, set[str]]:
    met: dict[str, set[str]] = {node: set() for node in nodes}
    for each in (measured for measurements in rounds for measured in measurements):
        for node in met.keys() & set(each.nodes):
            met[node] |= met.keys() & set(each.nodes) - {node}
    return met


def _tournament(nodes: Sequence[str], number: int) -> list[Group]:
    """Round `number` of everybody against everybody (the circle method); with an odd number one rests."""
    seats: list[str | None] = [*nodes, None] if len(nodes) % 2 else [*nodes]
    first, *others = seats
    turn = number % len(others)
    turned = [first, *others[turn:], *others[:turn]]
    half = len(turned) // 2
    pairs = zip(turned[:half], reversed(turned[half:]), strict=True)
    return [(one, other) for one, other in pairs if one is not None and other is not None]


def _regrouped(nodes: Sequence[str], rounds: Sequence[Sequence[GroupMeasurement]], tolerance: float) -> list[Group]:
    """Suspects that no good node was measured with yet, each with a good one."""
    speeds, met = _speeds(nodes, rounds), _partners(nodes, rounds)
    best = max((speed or 0.0 for speed in speeds.values()), default=0.0)
    if best == 0.0:
        return []  # nothing works anywhere: that is no node's fault
    good = [node for node in nodes if (speeds[node] or 0.0) >= (1 - tolerance) * best]
    free, groups = list(good), list[Group]()
    for node in nodes:
        if node in good or not met[node].isdisjoint(good):
            continue
        if not free:
            break
        groups.append((node, free.pop(0)))
    return groups
