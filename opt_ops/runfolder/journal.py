"""The journal: one file for each daemon process, one line for each event, each line synced before the next action.

Line: `{"v", "seq", "epoch", "ts", "kind", …, "crc"}`, where crc is the CRC-32 of the line up to the comma before it.
The number of the file is the epoch of the daemon process and its fencing token. The process that creates file N with
O_EXCL owns the lineage. An older process that finds a higher file stops. A line that the older process still wrote
after file N was created has a sequence number that file N uses again. Readers drop that line.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_ops.contract.files import sync_folder
from opt_ops.core.codec import DecodeError, decode, encode
from opt_ops.core.events import Entry, Event
from opt_ops.core.text import from_iso, to_iso
from opt_ops.errors import OptOpsError

VERSION = 1
_SUFFIX = ".jsonl"


class JournalError(OptOpsError):
    """The journal is damaged: a bad line that is not the last of its file."""


class Fenced(OptOpsError):
    """A newer daemon process has taken over the lineage. This one must not write or act any more."""


def read(folder: Path) -> tuple[list[Entry], list[str]]:
    """Return all entries in order, and a note for each line that was skipped.

    Raises:
        JournalError: a line in the middle of a file is damaged, or written by a newer version.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    for path in _files(folder):
        for entry in _read_file(path, notes):
            while entries and entries[-1].seq >= entry.seq:
                orphan = entries.pop()
                notes.append(f"{path.name} took over: seq {orphan.seq} of epoch {orphan.epoch} is void")
            entries.append(entry)
    return entries, notes


class Journal:
    """The journal file of this daemon process. Opening it takes over the lineage."""

    def __init__(self, folder: Path) -> None:
        """Create the next file. `entries` holds the earlier entries, `notes` the lines of them that were skipped.

        Raises:
            JournalError: the journal is damaged or of a newer version.
            OSError: the file cannot be created.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.epoch, self._path, self._descriptor = self._take_over()
        try:
            self.entries, self.notes = read(folder)
        except Exception:
            self.withdraw()
            raise
        self._seq = self.entries[-1].seq if self.entries else 0

    def stamp(self, event: Event, ts: float) -> Entry:
        """Return the entry of an event, for `append`."""
        # The time takes its text form: the state here and the state of a replay are then equal to the last bit.
        return Entry(seq=self._seq + 1, epoch=self.epoch, ts=from_iso(to_iso(ts)), event=event)

    def append(self, entry: Entry) -> None:
        """Write a stamped entry and sync it.

        Raises:
            Fenced: a newer daemon process has taken over. Nothing was written.
            OSError: the disk is full or gone. The line may be torn. This supervisor must end; the next one skips it.
        """
        self.check_fence()
        line = _line(entry)
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise OSError(f"journal {self._folder}: wrote {written} of {len(line)} bytes")
        os.fdatasync(self._descriptor)
        self._seq = entry.seq

    def check_fence(self) -> None:
        """Check that no newer daemon process has taken over.

        Raises:
            Fenced: one has.
        """
        newest = max(_epochs(self._folder))
        if newest > self.epoch:
            raise Fenced(
                f"epoch {newest} has taken over {self._folder.parent} from epoch {self.epoch}",
                "another daemon is running; see opt-ops daemon status",
            )

    def close(self) -> None:
        """Close the file. The lineage stays owned by this process until another one takes over."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def withdraw(self) -> None:
        """Close the file after a failed start, and delete it if it is empty.

        A daemon that starts a supervisor every few seconds on a full disk would leave thousands of empty files. The
        supervisor has done nothing yet, so the number of its file may be used again.
        """
        empty = os.fstat(self._descriptor).st_size == 0
        self.close()
        if empty:
            self._path.unlink(missing_ok=True)

    def _take_over(self) -> tuple[int, Path, int]:
        epoch = max(_epochs(self._folder), default=0) + 1
        while True:
            try:
                path = self._folder / f"{epoch:06d}.jsonl"
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            except FileExistsError:
                epoch += 1
                continue
            sync_folder(self._folder)
            return epoch, path, descriptor


def _epochs(folder: Path) -> dict[int, str]:
    """The names of the files, by epoch."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if entry.name.endswith(_SUFFIX)]
    return {int(stem): name for name in names if (stem := name.removesuffix(_SUFFIX)).isdigit()}


def _files(folder: Path) -> list[Path]:
    return [folder / name for _, name in sorted(_epochs(folder).items())]


def _line(entry: Entry) -> bytes:
    head = {"v": VERSION, "seq": entry.seq, "epoch": entry.epoch, "ts": to_iso(entry.ts)}
    body = json.dumps(head | encode(entry.event), allow_nan=False, ensure_ascii=False)[:-1].encode()
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


_CRC_LENGTH = len(', "crc": "00000000"}')


def _read_file(path: Path, notes: list[str]) -> Iterator[Entry]:
    lines = path.read_bytes().split(b"\n")
    complete, rest = lines[:-1], lines[-1]
    if rest:
        notes.append(f"{path.name}: the last line is torn and was skipped")
    for number, line in enumerate(complete, 1):
        fields = _parse(line)
        if fields is None:
            if number == len(complete) and not rest:
                notes.append(f"{path.name}: the last line fails its checksum and was skipped")
                return
            raise JournalError(
                f"{path}, line {number}: fails its checksum",
                "restore the file from a backup; opt-ops does not guess what happened",
            )
        if fields.get("v", 0) > VERSION:
            raise JournalError(f"{path}, line {number}: version {fields['v']}", "use the opt-ops that wrote it")
        try:
            event = decode(fields)
        except DecodeError as error:
            raise JournalError(f"{path}, line {number}: {error}", "use the opt-ops that wrote it") from error
        yield Entry(seq=fields["seq"], epoch=fields["epoch"], ts=from_iso(fields["ts"]), event=event)


def _parse(line: bytes) -> dict[str, Any] | None:
    body, tail = line[:-_CRC_LENGTH], line[-_CRC_LENGTH:]
    if tail != f', "crc": "{zlib.crc32(body):08x}"}}'.encode():
        return None
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
