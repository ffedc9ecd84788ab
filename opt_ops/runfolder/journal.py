"""The journal: one file for each life of the daemon, one line for each event, each line synced before anything follows.

Line: `{"v", "seq", "epoch", "ts", "kind", …, "crc"}`, where crc is the CRC-32 of the line up to the comma before
it. The number of the file is the life's epoch and its fencing token: whoever creates file N with O_EXCL owns the
lineage, and an older life that finds a file above its own stops. A line that such an older life still wrote after
file N was begun carries a sequence number that file N has used again; readers drop it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_ops.core.codec import DecodeError, decode, encode
from opt_ops.core.events import Entry, Event
from opt_ops.core.text import from_iso, to_iso
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import sync_folder

VERSION = 1
_SUFFIX = ".jsonl"


class JournalError(OptOpsError):
    """A journal that cannot be trusted: a bad line that is not the last of its file."""


class Fenced(OptOpsError):
    """A newer life of the daemon has taken over; this one must not write or act any more."""


def read(folder: Path) -> tuple[list[Entry], list[str]]:
    """All entries in order, and what was left out and why.

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
    """This life's file. Opening it takes the lineage over."""

    def __init__(self, folder: Path) -> None:
        """Create the next file; the entries so far are in `entries`, remarks on them in `notes`."""
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
        """The entry that `append` would write for this event."""
        # Through the text form, so that the state of this life and that of a replay are equal to the last bit.
        return Entry(seq=self._seq + 1, epoch=self.epoch, ts=from_iso(to_iso(ts)), event=event)

    def append(self, entry: Entry) -> None:
        """Write a stamped entry and sync it.

        Raises:
            Fenced: a newer life has taken over. Nothing was written.
            OSError: the disk is full or gone. The line may be torn; this life must end, the next one copes.
        """
        self.check_fence()
        line = _line(entry)
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise OSError(f"journal {self._folder}: wrote {written} of {len(line)} bytes")
        os.fdatasync(self._descriptor)
        self._seq = entry.seq

    def check_fence(self) -> None:
        """Raise `Fenced` if a newer life has taken over."""
        newest = max(_epochs(self._folder))
        if newest > self.epoch:
            raise Fenced(
                f"epoch {newest} has taken over {self._folder.parent} from epoch {self.epoch}",
                "another daemon is running; see opt-ops daemon status",
            )

    def close(self) -> None:
        """Let go of the file. The lineage stays ours until someone takes it over."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def withdraw(self) -> None:
        """Let go after a beginning that failed, without a trace if not a byte could be written: a life begun every few
        seconds on a full disk would leave thousands of files. It has done nothing, so its number may be used again.
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
    """The files' names, by the epoch of the life that began each."""
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
        notes.append(f"{path.name}: the last line is torn and was left out")
    for number, line in enumerate(complete, 1):
        fields = _parse(line)
        if fields is None:
            if number == len(complete) and not rest:
                notes.append(f"{path.name}: the last line fails its checksum and was left out")
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
