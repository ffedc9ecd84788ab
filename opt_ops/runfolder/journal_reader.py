"""Reads a journal, and verifies what its writers promised: no line is missing, none comes twice, none is foreign."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from opt_ops.core.codec import LINEAGE, DecodeError, UnknownKind, Vocabulary
from opt_ops.core.events import Entry
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.status import IllegalTransition
from opt_ops.core.text import from_iso
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import open_regular
from opt_ops.runfolder.owner import HIGHEST_EPOCH

VERSION = 1
CAMPAIGNS = "campaigns"
"""The folder of all campaigns, beside the lineages."""
_NAME = re.compile(r"([0-9]{6,16})\.jsonl")
_CRC_LENGTH = len(', "crc": "00000000"}')
_NEWER = "use the opt-ops that wrote it"


class JournalError(OptOpsError):
    """The journal cannot be trusted: a line is damaged, missing, foreign or of a newer version.

    `reading` holds what was good before that line; None if every line is whole, but the event of line `seq` cannot
    follow. `newer`: another version of opt-ops wrote it.
    """

    reading: Reading | None = None
    seq = 0
    newer = False


class SnapshotInDoubt(Exception):
    """The journal does not go on where a snapshot ended. Read all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place in the journal: after which line. `crc` is that line's checksum, `offset` where its file goes on."""

    seq: int = 0
    epoch: int = 0
    crc: str = ""
    offset: int = 0
    line: int = 0


@dataclass(slots=True, kw_only=True)
class Reading:
    """The entries of a journal after `start`, and what the reader has to say of them."""

    start: Position
    entries: list[Entry] = field(default_factory=list[Entry])
    crcs: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    end: Position

    @property
    def seq(self) -> int:
        """Of the newest entry."""
        return self.entries[-1].seq if self.entries else self.start.seq

    def crc_at(self, seq: int) -> str | None:
        """The checksum of the line with this number; None if this reading does not know it."""
        if seq == self.start.seq:
            return self.start.crc
        at = seq - self.start.seq - 1
        return self.crcs[at] if 0 <= at < len(self.crcs) else None


def read(folder: Path, vocabulary: Vocabulary = LINEAGE) -> tuple[list[Entry], list[str]]:
    """Return all entries in order, and a note for each line or file that was skipped.

    Raises:
        JournalError: a line is damaged, missing, foreign or of a newer version; says which.
    """
    reading = scan(folder, vocabulary=vocabulary)
    return reading.entries, reading.notes


def scan(
    folder: Path,
    start: Position | None = None,
    known: int = 0,
    until: int | None = None,
    vocabulary: Vocabulary = LINEAGE,
) -> Reading:
    """Read the journal after a position.

    Args:
        folder: The journal folder.
        start: Where a snapshot ended. None: from the beginning.
        known: An epoch whose file exists, even if a listing does not show it yet.
        until: The last line that is wanted. None: all.
        vocabulary: The kinds of its events.

    Raises:
        JournalError: a line is damaged, missing, foreign or of a newer version; says which.
        SnapshotInDoubt: the journal does not go on at `start`.
    """
    begin = start or Position()
    reading = Reading(start=begin, end=begin)
    tip = read_tip(folder)
    files, foreign = files_in(folder)
    reading.notes += [f"{name} is no journal file and is ignored" for name in foreign]
    for epoch in {known, tip.epoch if tip else 0} - files.keys() - {0}:
        if (path := folder / file_name(epoch)).is_file():
            files[epoch] = path
    try:
        for epoch, path in sorted(files.items()):
            if epoch >= begin.epoch:
                _FileReader(path, epoch, reading, tip, vocabulary).read(until)
            if until is not None and reading.seq >= until:
                return reading
        _check_tip_file(folder, files, reading, tip)
    except JournalError as error:
        error.reading = reading
        raise
    return reading


def _check_tip_file(folder: Path, files: Mapping[int, Path], reading: Reading, tip: Position | None) -> None:
    if tip is not None and tip.epoch not in files and tip.seq > reading.seq:
        path = folder / file_name(tip.epoch)
        why = f"{path} is missing: the journal was written up to seq {tip.seq}, and ends at seq {reading.seq}"
        raise JournalError(why, repair_hint(folder))


def replayed(folder: Path, entries: Iterable[Entry], state: State | None = None) -> State:
    """Fold entries onto a state, or onto none.

    Raises:
        JournalError: an event cannot follow on the one before; says in which line it is.
    """
    state = state or State()
    for entry in entries:
        try:
            state = fold(state, entry)
        except IllegalTransition as error:
            path = folder / file_name(entry.epoch)
            refused = JournalError(f"{path}, line {_line_number(path, entry)}: {error}", repair_hint(folder))
            refused.seq = entry.seq
            raise refused from error
    return state


def _line_number(path: Path, entry: Entry) -> int:
    found = (number for number, text in lines_of(path) if (parse(text) or {}).get("seq") == entry.seq)
    return next(found, 0)


def repair_hint(folder: Path) -> str:
    """What to do about a journal that cannot be trusted."""
    if folder.parent.parent.name == CAMPAIGNS:
        return f"move {folder.parent} away: the lineages are whole without it, and no further size is started"
    return f"opt-ops doctor --repair {folder.parent.name} says what is lost, and goes on from the last good line"


def file_name(epoch: int) -> str:
    """The name of an epoch's file."""
    return f"{epoch:06d}.jsonl"


def files_in(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """The journal files by epoch, and the names of what else is there. Temporary files are not counted."""
    if not folder.is_dir():
        return {}, []
    files: dict[int, Path] = {}
    foreign: list[str] = []
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda each: each.name):
            match = _NAME.fullmatch(entry.name)
            epoch = int(match[1]) if match else 0
            ours = 0 < epoch <= HIGHEST_EPOCH and entry.name == file_name(epoch)
            if ours and entry.is_file(follow_symlinks=False):
                files[epoch] = folder / entry.name
            elif not entry.name.startswith("."):
                foreign.append(ascii(entry.name))
    return files, foreign


def content(path: Path, offset: int = 0) -> bytes:
    """The bytes of a regular file from an offset on.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        file.seek(offset)
        return file.read()


# ---- the tip: which line was written last


def tip_path(folder: Path) -> Path:
    """The file that names the last line. It proves that the end of the journal is not missing."""
    return folder.with_name(f"{folder.name}.tip")


def tip_text(epoch: int, seq: int, crc: str) -> bytes:
    """The content of that file: always of the same length, so that one write replaces it."""
    body = f"{epoch:016d} {seq:016d} {crc}"
    return f"{body} {zlib.crc32(body.encode()):08x}\n".encode()


def read_tip(folder: Path) -> Position | None:
    """The line that was written last; None if that is not known."""
    try:
        text = content(tip_path(folder)).decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    body, _, check = text.rstrip("\n").rpartition(" ")
    parts = body.split(" ")
    if check != f"{zlib.crc32(body.encode()):08x}" or len(parts) != 3:
        return None
    return Position(epoch=int(parts[0]), seq=int(parts[1]), crc=parts[2])


# ---- lines


@dataclass(frozen=True, slots=True)
class _Line:
    entry: Entry
    crc: str
    follows: str | None  # the checksum of the line before it; None: an older opt-ops did not write it


class _FileReader:
    """Reads one file into a `Reading`."""

    def __init__(self, path: Path, epoch: int, reading: Reading, tip: Position | None, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._path, self._epoch, self._reading = path, epoch, reading
        self._tip = tip if tip is not None and tip.epoch == epoch else None
        self._last: int | None = None  # the number of the line before, in this file
        begin = reading.start
        self._offset, self._number = (begin.offset, begin.line) if begin.epoch == epoch else (0, 0)
        if begin.epoch == epoch and begin.seq:
            self._last = begin.seq

    def read(self, until: int | None = None) -> None:
        """Read the file to its end, or to a line."""
        lines = content(self._path, self._offset).split(b"\n")
        complete, rest = lines[:-1], lines[-1]
        torn = bool(rest)
        if rest:
            self._reading.notes.append(f"{self._path.name}: the last line is torn and was skipped")
        for count, text in enumerate(complete, 1):
            self._number += 1
            line = self._parsed(text, last=count == len(complete) and not rest)
            if line is None:
                torn = True
                break
            self._offset += len(text) + 1
            self._take(line)
            if line.entry.seq == until:
                return
        self._check_tip(torn)

    def _parsed(self, text: bytes, last: bool) -> _Line | None:
        fields = parse(text)
        if fields is None:
            if last:
                self._reading.notes.append(f"{self._path.name}: the last line fails its checksum and was skipped")
                return None
            raise self._error("fails its checksum")
        version = fields.get("v", 0)
        if version != VERSION:
            raise self._error(f"version {version}", newer=True)
        try:
            entry = entry_of(fields, self._vocabulary)
        except DecodeError as error:
            raise self._error(str(error), newer=isinstance(error, UnknownKind)) from error
        follows = fields.get("prev")
        return _Line(entry, fields["crc"], follows if isinstance(follows, str) else None)

    def _take(self, line: _Line) -> None:
        """Add a line, if it is the one that must come now."""
        entry, reading = line.entry, self._reading
        if entry.epoch != self._epoch:
            raise self._error(f"belongs to epoch {entry.epoch}, and the file to epoch {self._epoch}")
        expected = (reading.seq if self._last is None else self._last) + 1
        if entry.seq > expected:
            raise self._error(f"has seq {entry.seq}, and seq {expected} to {entry.seq - 1} are missing before it")
        if entry.seq < expected and self._last is not None:
            raise self._error(f"has seq {entry.seq} after seq {self._last}: it comes twice, or out of order")
        if entry.seq <= reading.start.seq and reading.start.seq:
            raise SnapshotInDoubt
        while reading.entries and reading.entries[-1].seq >= entry.seq:
            orphan = reading.entries.pop()
            reading.crcs.pop()
            took_over = f"{self._path.name} took over"
            reading.notes.append(f"{took_over}: seq {orphan.seq} of epoch {orphan.epoch} is void")
        before = reading.crc_at(entry.seq - 1)
        if line.follows is not None and before is not None and line.follows != before:
            if reading.start.seq and entry.seq == reading.start.seq + 1:
                raise SnapshotInDoubt
            raise self._error(f"does not follow on the line with seq {entry.seq - 1}: one of them is foreign")
        reading.entries.append(entry)
        reading.crcs.append(line.crc)
        reading.end = Position(seq=entry.seq, epoch=self._epoch, crc=line.crc, offset=self._offset, line=self._number)
        self._last = entry.seq

    def _check_tip(self, torn: bool) -> None:
        """Check that the line which was written last is there, unless it is the one that is torn now."""
        tip, last = self._tip, self._last or 0
        if tip is not None and tip.seq > last + torn:
            raise JournalError(
                f"{self._path}, line {self._number}: the file ends at seq {last}, and was written up to seq {tip.seq}",
                repair_hint(self._path.parent),
            )

    def _error(self, why: str, *, newer: bool = False) -> JournalError:
        hint = _NEWER if newer else repair_hint(self._path.parent)
        error = JournalError(f"{self._path}, line {self._number}: {why}", hint)
        error.newer = newer
        return error


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file, each with its number."""
    yield from enumerate(content(path).split(b"\n")[:-1], 1)


def parse(line: bytes) -> dict[str, Any] | None:
    """The fields of a line; None if its checksum or its JSON is wrong."""
    body, tail = line[:-_CRC_LENGTH], line[-_CRC_LENGTH:]
    if tail != f', "crc": "{zlib.crc32(body):08x}"}}'.encode():
        return None
    try:
        fields = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else None


def entry_of(fields: dict[str, Any], vocabulary: Vocabulary = LINEAGE) -> Entry:
    """The entry that a line holds.

    Raises:
        DecodeError: a field is missing or of a wrong type.
    """
    seq, epoch, ts = fields.get("seq"), fields.get("epoch"), fields.get("ts")
    if not _whole(seq) or not _whole(epoch) or not isinstance(ts, str):
        raise DecodeError("seq, epoch and ts must be two whole numbers and a time")
    try:
        at = from_iso(ts)
    except ValueError as error:
        raise DecodeError(f"ts: {error}") from error
    return Entry(seq=cast("int", seq), epoch=cast("int", epoch), ts=at, event=vocabulary.decode(fields))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
