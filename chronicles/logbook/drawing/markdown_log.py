"""The log of `logbook.md`: the entries of the story, each with its members, later facts, and the evidence inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from chronicles.logbook.drawing.markup import code, plain, quote, table
from chronicles.logbook.entries.entry import MACHINE, Fact, LogEntry
from chronicles.logbook.story.members import Member, members_of
from chronicles.logbook.story.model import Afterthought, Fold, Story, StoryEntry
from chronicles.report.model import IncidentReport, LineageReport, ReadbackReport
from chronicles.wording import duration, minute, rate, whole
from opt_ops.core.text import moment, printable

_IN_FULL = (Fold.SINGLE, Fold.BURST, Fold.CHAIN)
"""Their evidence stands below them if they are large. Of all others, logbook.html and report.json have it."""
_TOGETHER = (Fold.BURST, Fold.CHAIN, Fold.CAPACITY)
_CROWDED = (
    "*So many incidents are told by day. logbook.html has a row for each; `opt-ops explain INCIDENT` and report.json "
    "have the evidence.*"
)
_MANY = 40  # entries of the evidence: of more than these, only what changed settings or concerns people is in full


def log(report: LineageReport, story: Story) -> Iterator[str]:
    """All entries: of a lineage that has ended the oldest first, else the newest first."""
    yield f"## Log, {'oldest' if report.ended else 'newest'} first"
    yield ""
    if not story.entries:
        yield "Nothing has happened yet."
        yield ""
    if story.is_crowded:
        yield _CROWDED
        yield ""
    thoughts: dict[str, list[Afterthought]] = {}
    for thought in story.afterthoughts:
        thoughts.setdefault(thought.anchor, []).append(thought)
    few = sum(len(each.members) for each in story.entries) <= _MANY
    minutes = Counter(entry.begin // 60 for entry in story.entries)
    for entry in story.entries if report.ended else reversed(story.entries):
        added = [thought for anchor in entry.members for thought in thoughts.get(anchor, ())]
        seconds = minutes[entry.begin // 60] > 1  # others began in the same minute
        yield f"### {span(entry, seconds)} · {plain(entry.title)}"
        yield ""
        if story.is_crowded and not entry.large:
            added = []
        yield from _entry(entry, sorted(added, key=lambda thought: thought.at), report, story.is_crowded)
        yield from _inside(entry, few, story.is_crowded)


def span(entry: StoryEntry, seconds: bool) -> str:
    """`2021-11-17 23:59`; of an entry that lasted, `2021-12-01 23:53 to 12-02 00:59`. With seconds if they matter."""
    begin, end = moment(entry.begin), moment(entry.end)
    first = begin.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")
    if len(entry.members) < 2 or begin.strftime("%m-%d %H:%M") == end.strftime("%m-%d %H:%M"):
        return first
    return f"{first} to {end.strftime('%H:%M' if begin.date() == end.date() else '%m-%d %H:%M')}"


def _entry(entry: StoryEntry, thoughts: Sequence[Afterthought], report: LineageReport, crowded: bool) -> Iterator[str]:
    if entry.text:
        yield " ".join(plain(sentence) for sentence in entry.text)
        yield ""
    for thought in thoughts:
        yield _added(thought, entry, report)
        yield ""
    if len(entry.members) > 1 and not (crowded and entry.rule not in _IN_FULL):
        rows = [_row(each) for each in members_of(entry)]
        if entry.seconds_down and entry.rule in _TOGETHER:  # members of one standstill share it
            rows.append(["Together", "", "", whole(entry.steps_lost), duration(entry.seconds_down), ""])
        yield from table(["Time", "Where", "What", ">Steps", ">Downtime", "Entry"], rows)
        yield ""


def _inside(entry: StoryEntry, few: bool, crowded: bool) -> Iterator[str]:
    """The evidence, as far as it is not in the other files only; what people wrote in any case."""
    for member in entry.entries:
        if (
            entry.large
            and entry.rule in _IN_FULL
            and (few or _is_of_note(member))
            and not (crowded and _is_proven(member))
        ):
            yield from _evidence(member)
        else:
            yield from _said(member)


def _is_of_note(entry: LogEntry) -> bool:
    """Whether settings were changed, training halted, a proof failed, or people did something."""
    row = entry.incident
    if row is None:
        return entry.notable or entry.author != MACHINE
    return entry.notable or row.proven is False or bool(entry.remarks) or entry.drill is not None or row.advisory


def _is_proven(entry: LogEntry) -> bool:
    """Whether it is an incident of a proven recovery in which nobody had a hand."""
    row = entry.incident
    return (
        row is not None and row.proven is True and not (entry.remarks or entry.drill or row.advisory or row.requested)
    )


def _row(member: Member) -> list[str]:
    steps = "" if member.steps_lost is None else whole(member.steps_lost)
    seconds = "" if not member.seconds_down else duration(member.seconds_down)
    return [member.time, plain(member.where), plain(member.what), steps, seconds, plain(member.anchor)]


def _added(thought: Afterthought, entry: StoryEntry, report: LineageReport) -> str:
    """A later fact about an entry, with the time at which it was known."""
    at = moment(thought.at)
    when = at.strftime("%H:%M" if at.date() == moment(entry.end).date() else "%-d %B %H:%M")
    if report.ended is not None and thought.at >= report.ended:
        when = "at the end"
    command = f" Next: {code(thought.next)}" if thought.next else ""
    return f"*Added {when}:* {plain(thought.text)}{command}"


def _said(entry: LogEntry) -> Iterator[str]:
    """What people wrote about it: words of people are never folded away."""
    if entry.quote:
        yield from quote(entry.quote)
        yield ""
    for remark in entry.remarks:
        what = "Correction" if remark.correction else "Note"
        yield f"**{what} by {plain(remark.author)}, {minute(remark.ts)}:**"
        yield ""
        yield from quote(remark.text)
        yield ""


def _evidence(entry: LogEntry) -> Iterator[str]:
    """The entry as it was written."""
    head, author, rest = entry.heading.partition(f" [{entry.author}]: ")
    drill = f" · DRILL {plain(entry.drill)}" if entry.drill else ""
    title = f"{plain(head)}{f' [{plain(entry.author)}]: ' if author else ''}{plain(rest)}"
    yield f"**{plain(entry.anchor)}**, {title}{drill}"
    yield ""
    yield from _said(replace(entry, remarks=()))
    for fact in entry.facts:
        yield f"**{fact.label}.** {plain(fact.text)}" + (f" Log line: {code(fact.line)}" if fact.line else "")
        yield ""
        yield from _below(fact, entry)
    if entry.changes:
        yield "```diff"
        for what, before, after in entry.changes:
            for sign, side in (("-", before), ("+", after)):
                if side:
                    yield f"{sign} {printable(what)}: {printable(side)}"
        yield "```"
        yield ""
    yield from _said(replace(entry, quote=""))


def _below(fact: Fact, entry: LogEntry) -> Iterator[str]:
    """The table or the numbers that belong to a fact."""
    if fact.label == "Stacks" and entry.stacks:
        rows = [[f"**{row.ranks}**" if row.odd else row.ranks, plain(row.frames)] for row in entry.stacks]
        yield from table(["Ranks", "Innermost frames"], rows)
        yield ""
    if fact.label == "Experiment" and entry.trials:
        rows = [[plain(cell) for cell in trial] for trial in entry.trials]
        yield from table(["Probe", "Node", "Result", "What it showed"], rows)
        yield ""
    if fact.label == "Cost" and entry.spans:
        yield ", ".join(f"{duration(seconds)} {label}" for label, seconds in entry.spans) + "."
        yield ""
    if fact.label == "Proof" and entry.incident and entry.incident.readbacks and _is_of_interest(entry.incident):
        yield from table([">Step", ">Expected", ">Read back", ">Loss"], [*map(_readback, entry.incident.readbacks)])
        yield ""


def _readback(item: ReadbackReport) -> list[str]:
    loss = "not finite" if item.loss is None else f"{item.loss:.4f}"
    return [whole(item.step), rate(item.due_lr), rate(item.lr), loss]


def _is_of_interest(row: IncidentReport) -> bool:
    """Whether the learning rate changed, or the proof failed. Of a mere restart, the sentence is enough."""
    return row.lr_before not in (None, row.lr_after) or row.proven is not True
