"""A record of which all that gives the site away is replaced. Everything that is drawn from it is redacted alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast, get_args, get_type_hints

from chronicles.publish.left_out import LeftOut, taken
from chronicles.publish.names import Names, is_number
from chronicles.publish.patterns import COMMON, own_names
from chronicles.record import LineageRecord, from_entries
from opt_ops.core.codec import decode, encode
from opt_ops.core.detect.point import Point
from opt_ops.core.events import KINDS, Entry
from opt_ops.core.names import PROBE

_NODES = frozenset({"node", "nodes", "exclude", "excluded"})
_PEOPLE = frozenset({"author", "by"})
_JOBS = frozenset({"job", "jobs"})
_GPUS = frozenset({"uuid", "serial"})
_NOBODY = frozenset({"", "opt-ops", "operator", "unknown"})

_OURS = frozenset(
    (
        *("kind", "status", "verdict", "action", "outcome", "tier", "severity", "driver", "fault", "failure", "topic"),
        *("lineage", "run", "parent", "attempt", "allocation", "incident", "drill", "playbook", "policy", "recipe"),
        *("verb", "version", "data_digest"),
    )
)
"""Fields that hold words and names of ours: they stay. The check at the end reads them, too."""

_WORD = re.compile(r"[a-z]+(?:_[a-z]+)*")
_ATTEMPT = re.compile(r"\d+\.\d{2,}(?:-a\d+)?")
"""A run or an attempt, which asks for changes as people do."""

_EPOCH = 1e9  # seconds since the epoch are more than that; no duration is


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the one who publishes asked for."""

    keep: frozenset[str] = frozenset()  # nodes, people, jobs
    with_notes: bool = False
    shift_seconds: float = 0.0


class Redaction:
    """Replaces in a record what gives the site away, in order of first appearance."""

    def __init__(self, record: LineageRecord, names: Names, wishes: Wishes, site: Iterable[tuple[str, str]]) -> None:
        self.names, self.left, self._wishes, self._lineage = names, LeftOut(), wishes, record.lineage
        self._entries = [(entry, self._without_words(encode(entry.event))) for entry in record.entries]
        originals = [each for _, fields in self._entries for each in _typed(fields)]
        originals += [(sort, original, "") for sort, original in site]
        names.expect(original for _, original, _ in originals)
        for each in dict.fromkeys(originals):
            self._add(*each)
        self.record = self._redacted(record)

    def _without_words(self, fields: dict[str, Any]) -> dict[str, Any]:
        return fields if self._wishes.with_notes else taken(fields, self.left)

    def _add(self, sort: str, original: str, like: str = "") -> None:
        if re.fullmatch(own_names(self._lineage), original):
            return  # the local scheduler names a job as its allocation
        if sort in self._wishes.keep:
            self.names.keep(original)
        elif sort not in ("partitions", "accounts") or original.lower() not in COMMON:
            self.names.add(sort, original, like)

    def _redacted(self, record: LineageRecord) -> LineageRecord:
        entries = [
            Entry(
                seq=entry.seq,
                epoch=entry.epoch,
                ts=entry.ts + self._wishes.shift_seconds,
                event=decode(self._fields(fields)),
            )
            for entry, fields in self._entries
        ]
        points = {curve.attempt: [self._point(point) for point in curve.points] for curve in record.curves}
        remarks = [self.text(remark) for remark in record.remarks]
        redacted = from_entries(record.lineage, entries, remarks, lambda attempt: points.get(attempt, ()))
        return replace(redacted, children=record.children)

    def _fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._value(key, value) for key, value in fields.items()}

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, str):
            return value if key in _OURS else self._text_of(key, value)
        if isinstance(value, dict):
            items = cast("dict[str, Any]", value).items()
            return {self._key(name): self._value(name, item) for name, item in items}
        if isinstance(value, (list, tuple)):
            return [self._value(key, item) for item in cast("Sequence[Any]", value)]
        if isinstance(value, float) and value > _EPOCH:
            return value + self._wishes.shift_seconds
        return value

    def _key(self, name: str) -> str:
        """A key: words of ours stay, whoever is called so; other keys are others' texts."""
        is_ours = name in _FIELDS or (is_word(name) and name not in self.names.table["nodes"])
        return name if is_ours else self._text_of("", name)

    def _text_of(self, key: str, value: str) -> str:
        if key in _JOBS and "jobs" not in self._wishes.keep:
            return self.names.table["jobs"].get(value) or self.text(value)
        if key in _GPUS:
            return self.names.table["gpus"].get(value) or self.text(value)
        if key in _PEOPLE and value.isdigit() and "people" not in self._wishes.keep:
            return self.names.table["people"].get(value) or self.text(value)
        if value in self.names.table["nodes"] and is_number(value):  # a number of ours would be no text
            return self.names.add("nodes", value)
        return self.text(value)

    def text(self, text: str) -> str:
        """A text without copies of what is left out, and with every original replaced."""
        return self.names.apply(self._jobs(self.left.without_copies(text)))

    def _jobs(self, text: str) -> str:
        """Numbers of jobs are only known as such where the text speaks of jobs."""
        return self.names.apply_jobs(text) if "job" in text.lower() else text

    def _point(self, point: Point) -> Point:
        """A line of telemetry: names of corpora, stages and blocks, and what a save failed of, are others' texts."""
        error = point.save_error
        if error and not self._wishes.with_notes:
            error = self.left.take("log lines", error)
        return replace(
            point,
            ts=point.ts + self._wishes.shift_seconds,
            save_error=self.text(error) if error else error,
            skip=self.text(point.skip) if point.skip else point.skip,
            stage=self.text(point.stage) if point.stage else point.stage,
            bad_module=self.text(point.bad_module) if point.bad_module else point.bad_module,
            valid={self.text(name): loss for name, loss in point.valid.items()} if point.valid else point.valid,
        )


def _typed(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The originals that a field's name tells of: (sort, original, another name of the same thing)."""
    node = fields.get("node")
    for key, value in fields.items():
        if key in _NODES:
            yield from (("nodes", each, "") for each in _texts(value))
        elif key == "host" and isinstance(value, str):
            yield "hosts", value, node if isinstance(node, str) else ""
        elif key in _PEOPLE and isinstance(value, str) and _is_person(value):
            yield "people", value, ""
        elif key in _JOBS:
            yield from (("jobs", each, "") for each in _texts(value))
        elif key in _GPUS and isinstance(value, str):
            yield "gpus", value, str(fields.get("uuid") or "")
        if isinstance(value, dict):
            yield from _typed(cast("dict[str, Any]", value))
        elif isinstance(value, list):
            for item in cast("list[Any]", value):
                if isinstance(item, dict):
                    yield from _typed(cast("dict[str, Any]", item))


def is_word(key: str) -> bool:
    """Whether a key of an event is made of plain words, as those of ours are."""
    return _WORD.fullmatch(key) is not None


def _is_person(value: str) -> bool:
    """Whether the author of something is a person, not the daemon or an attempt."""
    return value not in _NOBODY and PROBE.fullmatch(value) is None and _ATTEMPT.fullmatch(value) is None


def _fields_of(hint: Any) -> Iterator[str]:
    """The names of all fields of an event, and of the values within it."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield from (field.name for field in fields(hint))
        for each in get_type_hints(hint).values():
            yield from _fields_of(each)
    for each in get_args(hint):
        yield from _fields_of(each)


_FIELDS = frozenset(name for event in KINDS.values() for name in _fields_of(event))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _texts(item)
