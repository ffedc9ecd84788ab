"""What happened between two times, for notes: entries of the story, and every word that a person wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from chronicles.logbook.drawing.markup import plain, quote
from chronicles.logbook.entries import operators
from chronicles.logbook.entries.entry import MACHINE, LogEntry
from chronicles.logbook.open_questions import drill_mark
from chronicles.logbook.story.model import StoryEntry
from chronicles.record import LineageRecord, Moment
from chronicles.wording import short
from opt_ops.core import events as e
from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.names import parse_alert_id
from opt_ops.core.text import moment
from opt_ops.core.told import told

QUOTED = 500  # characters of a note or a reason

_INTERNAL = {"key": ""}  # no field of JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something that happened, in one line, with the words of the person behind it. Plain text, not escaped."""

    at: Moment
    author: str
    text: str
    quote: str | None  # a note's text or a request's reason, at most 500 characters
    drill: str | None  # the drill that caused it
    anchor: str  # of the entry in the logbook
    large: bool = field(metadata=_INTERNAL)  # worth a line wherever space is short


def happenings(record: LineageRecord, story: Sequence[StoryEntry], after: float, until: float) -> list[Happening]:
    """What happened after `after` and until `until`, oldest first."""
    events = {f"e{entry.seq}": entry.event for entry in record.entries}
    found: list[Happening] = []
    for each in story:
        drills = {entry.anchor: drill_of(record, events, entry) for entry in each.entries}
        if each.end > after and each.begin <= until:
            found += _told(each, drills)
        for entry in each.entries:
            found += _remarks(entry, drills[entry.anchor])
    found += _told_only(record)
    shown = (each for each in found if each.at <= until and (each.at > after or _lasts(each, story, after)))
    return sorted(shown, key=lambda each: each.at)


def _lasts(each: Happening, story: Sequence[StoryEntry], after: float) -> bool:
    """Whether it is an entry that began before `after` and ended later."""
    return each.quote is None and any(each.anchor == of.anchor and of.end > after for of in story)


def _told(story: StoryEntry, drills: Mapping[str, str | None]) -> Iterator[Happening]:
    """The entry, and of one in which several people speak each member with its words."""
    speaking = [entry for entry in story.entries if entry.quote]
    speaker = speaking[0] if len(speaking) == 1 else None
    author = speaker.author if speaker else story.entries[0].author if len(story.entries) == 1 else MACHINE
    yield Happening(
        at=story.begin,
        author=author,
        text=_MARK.sub("", _QUOTED.sub("", story.title) if speaker else story.title),
        quote=short(speaker.quote, QUOTED) if speaker else None,
        drill=", ".join(sorted({drill for drill in drills.values() if drill})) or None,
        anchor=story.anchor,
        large=story.large,
    )
    for entry in speaking if speaker is None else ():
        yield Happening(
            at=Moment(entry.ts),
            author=entry.author,
            text=f"{entry.run} {entry.title}",
            quote=short(entry.quote, QUOTED),
            drill=drills[entry.anchor],
            anchor=entry.anchor,
            large=True,
        )


_MARK = re.compile(r"^(?:DRILL d\d+: )+")
_QUOTED = re.compile(r": “[^”]*”")  # as titles of the story end with what a person wrote, cut short


def _remarks(entry: LogEntry, drill: str | None) -> Iterator[Happening]:
    for remark in entry.remarks:
        yield Happening(
            at=Moment(remark.ts),
            author=remark.author,
            text=f"{'correction of' if remark.correction else 'note on'} {entry.anchor}",
            quote=short(remark.text, QUOTED),
            drill=drill,
            anchor=entry.anchor,
            large=True,
        )


def _told_only(record: LineageRecord) -> Iterator[Happening]:
    """Refused requests, proposals and their answers: the logbook has no entry of its own of them."""
    incidents = record.state.incidents
    for entry in record.entries:
        match entry.event:
            case e.RequestRefused():
                drill, author, reason = None, None, ""
            case e.ProposalMade(incident=incident):
                drill, author, reason = incidents[incident].drill, None, ""
            case e.ProposalAnswered(incident=incident, author=author, reason=reason):
                drill = incidents[incident].drill
            case _:
                continue
        yield Happening(
            at=Moment(entry.ts),
            author=author or MACHINE,
            text=told(entry.event),
            quote=short(reason, QUOTED) or None if author else None,
            drill=drill,
            anchor=f"e{entry.seq}",
            large=True,
        )


def drill_of(record: LineageRecord, events: Mapping[str, e.Event], entry: LogEntry) -> str | None:
    """The drill that caused an entry. `events` are the journal's events by anchor."""
    if entry.drill is not None:
        return entry.drill
    state = record.state
    match events.get(entry.anchor):
        case e.LineageHalted(incident=str(incident)):
            return state.incidents[incident].drill
        case e.SignalRaised() as raised:
            return drill_behind(state, raised)
        case e.AlertSettled(alert=alert):
            subject = parse_alert_id(alert).subject
            return state.incidents[subject].drill if subject in state.incidents else None
        case e.NoteAdded() as note:
            about = operators.anchor(note)
            return state.incidents[about].drill if about in state.incidents else None
        case _:
            return None


def lines(found: Sequence[Happening]) -> Iterator[str]:
    """The list in Markdown: each with its time and author, the drill that caused it, and what a person wrote."""
    for each in found:
        at = moment(each.at).strftime("%-d %b %H:%M:%S")
        yield f"- {at} · {plain(f'{drill_mark(each.drill)}{each.text}')}"
        if each.quote:
            named = each.author == MACHINE or each.text.startswith(f"{each.author} ")
            yield from (
                f"  {line}" for line in quote(f"{'' if named else f'{short(each.author, 40)}: '}“{each.quote}”")
            )
