"""The members of an entry of the story as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.story.model import StoryEntry
from chronicles.logbook.story.shared import rank_of
from chronicles.wording import nodes, second, short
from opt_ops.core.text import moment
from opt_ops.core.told.words import without_codes
from opt_ops.core.values import Action


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One entry of the evidence in a table."""

    anchor: str
    ts: float
    time: str  # with seconds; with the day, where the entry lasts longer than one
    where: str  # node or rank
    what: str
    steps_lost: int | None
    seconds_down: float | None


def members_of(entry: StoryEntry) -> list[Member]:
    """The members, oldest first."""
    first, last = moment(entry.begin).date(), moment(entry.end).date()
    return [_member(each, dated=first != last) for each in entry.entries]


def _member(entry: LogEntry, dated: bool) -> Member:
    row = entry.incident
    clock = second(entry.ts).removesuffix(" UTC")
    where = ""
    if row is not None:
        where = nodes(row.nodes) if row.nodes else rank_of(row)
    return Member(
        anchor=entry.anchor,
        ts=entry.ts,
        time=f"{moment(entry.ts).strftime('%m-%d')} {clock}" if dated else clock,
        where=where,
        what=short(_what(entry), 100),
        steps_lost=row.steps_discarded if row else None,
        seconds_down=row.seconds_down if row else None,
    )


_DONE = {Action.REPLACE_RANKS: "ranks replaced", Action.RESTART: "restarted", Action.EXCLUDE: "excluded"}


def _what(entry: LogEntry) -> str:
    """What was done and why, without the node, which has a column of its own."""
    row = entry.incident
    done = _DONE.get(row.action) if row is not None and row.action is not None else None
    if row is None or done is None or row.advisory or row.planned or not row.closed or row.proven is False:
        return entry.title if row is None else without_codes(entry.title)
    named = ", ".join(row.nodes)
    cause = without_codes(row.cause.removeprefix(named).lstrip(": ") if named else row.cause)
    return f"{done}: {cause.replace(f' on {named} ', ' ') if named else cause}"
