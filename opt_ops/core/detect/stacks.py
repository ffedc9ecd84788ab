"""Where the ranks of a hung attempt are: their stacks in groups, and who is not where the others are.

In a collective that never ends, all ranks but one wait in the same place; the one that is elsewhere is the cause.
ByteRobust clusters stacks to find the machine to exclude.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from opt_ops.core.values import StackGroup

_FRAME = re.compile(r'\s*File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>\S+)')  # faulthandler's
_KEPT = 12  # innermost frames that make two ranks alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """The ranks by what their main threads do, the largest group first."""

    groups: tuple[StackGroup, ...]
    odd: tuple[int, ...]
    silent: tuple[int, ...]


def group(stacks: Mapping[int, str], ranks: int) -> Stacks:
    """Compare the stacks of all ranks.

    Args:
        stacks: Text as faulthandler writes it, by rank; a rank that did not answer is missing.
        ranks: How many there are.

    Returns:
        The groups. `odd` is empty where nobody can be named: it is never more than half of the ranks.
    """
    by_frames: dict[tuple[str, ...], list[int]] = {}
    silent = tuple(rank for rank in range(ranks) if not main_thread(stacks.get(rank, "")))
    for rank in range(ranks):
        if rank not in silent:
            by_frames.setdefault(main_thread(stacks[rank]), []).append(rank)
    groups = sorted(by_frames.items(), key=lambda item: (-len(item[1]), item[1][0]))
    largest = len(groups[0][1]) if groups else 0
    others = [rank for _, members in groups[1:] for rank in members]
    if largest > len(others) + len(silent):
        odd = tuple(sorted([*others, *silent]))
    else:  # who does not answer at all stands out even where the rest is divided
        odd = silent if len(silent) <= ranks - len(silent) else ()
    return Stacks(
        groups=tuple(StackGroup(ranks=tuple(members), frames=frames) for frames, members in groups),
        odd=odd,
        silent=silent,
    )


def main_thread(text: str) -> tuple[str, ...]:
    """The innermost frames of the main thread, which faulthandler writes last: `file:name`, without line numbers."""
    sections = re.split(r"(?m)^(?:Current thread|Thread) 0x.*$", text)
    frames = [m for line in sections[-1].splitlines() if (m := _FRAME.match(line))]
    return tuple(f"{m['file'].rpartition('/')[2]}:{m['name']}" for m in frames[:_KEPT])
