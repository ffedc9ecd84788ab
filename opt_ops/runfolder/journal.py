"""The journal: one file for each daemon process, one line for each event, each line synced before the next action.

Line: `{"v", "seq", "epoch", "ts", "kind", …, "prev", "crc"}`. crc is the CRC-32 of the line up to the comma before it,
prev that of the line before. The number of the file is the epoch of the daemon process. The process that the owner file
names owns the lineage. A line that an older process still wrote has a sequence number that a later file uses again.
Readers drop that line.
"""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from pathlib import Path
from typing import Any, cast

from opt_ops.contract.files import sync_folder
from opt_ops.core.codec import LINEAGE, Vocabulary, check_limits
from opt_ops.core.events import Entry
from opt_ops.core.state.model import State
from opt_ops.core.text import from_iso, to_iso
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import snapshot
from opt_ops.runfolder.journal_reader import (
    VERSION,
    JournalError,
    Position,
    Reading,
    SnapshotInDoubt,
    file_name,
    files_in,
    read,
    replayed,
    scan,
    tip_path,
    tip_text,
)
from opt_ops.runfolder.owner import HIGHEST_EPOCH, LIFE_SECONDS, Fenced, OwnerFile

__all__ = ["VERSION", "Fenced", "Journal", "JournalError", "NotJournalable", "read", "replayed"]

LONGEST_LINE = 4 * 1024 * 1024
"""Bytes. The longest events name the ranks and nodes of a whole fleet: 0.3 MB with 2,048 nodes."""

SNAPSHOT_EVENTS = snapshot.EVERY_EVENTS

log = logging.getLogger(__name__)


class NotJournalable(OptOpsError):
    """An event that no reader of the journal could take. It was not written; the journal is as it was."""


class Journal:
    """The journal file of this daemon process. Opening it takes over the lineage, or the campaign."""

    def __init__(self, folder: Path, above: int = 0, vocabulary: Vocabulary = LINEAGE) -> None:
        """Create the next file. `entries` holds the earlier entries, `notes` the lines of them that were skipped.

        Args:
            folder: The journal folder.
            above: An epoch that node agents have seen. The new one is higher.
            vocabulary: The kinds of its events.

        Raises:
            Fenced: another daemon process takes over at this moment.
            JournalError: the journal is damaged or of a newer version.
            OSError: the file cannot be created.
        """
        self._descriptor = self._tip = -1
        self._vocabulary = vocabulary
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._owner_file = OwnerFile(folder)
        self._life_at = -LIFE_SECONDS
        # Before the takeover: who cannot read it must not fence its owner.
        first = scan(folder, known=self._known(), vocabulary=vocabulary)
        known = self._take_over(above)
        try:
            self.entries, self.notes, self._end = _completed(first, folder, known, vocabulary)
        except BaseException:
            self.withdraw()
            raise

    @property
    def lineage(self) -> Path:
        """The folder of the lineage."""
        return self._folder.parent

    def stamp(self, event: Any, ts: float) -> Entry:
        """Return the entry of an event, for `append`. Its event is the one that readers of the line will get.

        Raises:
            NotJournalable: no reader could take the line.
        """
        # The event goes through its text form: the state here and that of a replay are then equal to the last bit.
        try:
            read_back, at = _read_back(event, self._vocabulary), from_iso(to_iso(ts))
        except (ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
            raise NotJournalable(
                f"an event {self._vocabulary.kind_of(event)} was left out: {str(error)[:300]}",
                "correct the file that it was read from: it has a value that opt-ops does not take",
            ) from error
        return Entry(seq=self._end.seq + 1, epoch=self.epoch, ts=at, event=read_back)

    def append(self, entry: Entry) -> None:
        """Write a stamped entry and sync it.

        Raises:
            Fenced: a newer daemon process has taken over. Nothing was written.
            OSError: the disk is full or gone. The line may be torn. This supervisor must end; the next one skips it.
        """
        self.check_fence()
        line = _line(entry, self._end.crc, self._vocabulary)
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise OSError(f"journal {self._folder}: wrote {written} of {len(line)} bytes")
        os.fdatasync(self._descriptor)
        crc = _crc_of(line)
        self._end = Position(
            seq=entry.seq,
            epoch=self.epoch,
            crc=crc,
            offset=os.fstat(self._descriptor).st_size,
            line=self._end.line + 1 if self._end.epoch == self.epoch else 1,
        )
        self._write_tip(crc)

    def check_fence(self) -> None:
        """Open and read the owner file, and check that this process is still the owner.

        Raises:
            Fenced: it is not.
        """
        self._owner_file.check(self._owner)

    def move_above(self, epoch: int) -> bool:
        """Go on in a file of a higher epoch than `epoch`, which node agents have seen in foreign orders.

        Returns whether there is such an epoch: a forged one may be higher than any that opt-ops takes.

        Raises:
            Fenced: another daemon process has taken over.
            OSError: the file cannot be created.
        """
        self.check_fence()
        if epoch >= HIGHEST_EPOCH:
            return False
        old = self._descriptor
        self._take_over(max(epoch, self.epoch))
        os.close(old)
        return True

    def show_life(self, now: float) -> None:
        """Let other daemons see that the owner lives, every few seconds of monotonic time."""
        if now - self._life_at < LIFE_SECONDS:
            return
        self._life_at = now
        try:
            self._owner_file.show_life()
        except OSError as error:  # the next look tries again, and every effect checks the owner anyway
            log.warning("the owner file of %s cannot be touched: %s", self._folder, error)

    def save_snapshot(self, state: State) -> None:
        """Write the state beside the journal, for readers in a hurry; not if this process is not the owner any more.

        A failure is logged: readers do without.
        """
        try:
            self.check_fence()
            snapshot.save(self._folder, state, self._end)
        except (OSError, ValueError, Fenced) as error:
            log.warning("no snapshot of %s was written: %s", self._folder, error)

    def close(self) -> None:
        """Close the file. The lineage stays owned by this process until another one takes over."""
        for descriptor in (self._descriptor, self._tip):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._tip = -1

    def __del__(self) -> None:
        """Close the files of a journal that nobody holds any more."""
        self.close()

    def withdraw(self) -> None:
        """Close the file after a failed start, and delete it if it is empty.

        A daemon that starts a supervisor every few seconds on a full disk would leave thousands of empty files. The
        supervisor has done nothing yet, so no line is missing where this number is skipped.
        """
        empty = os.fstat(self._descriptor).st_size == 0
        self.close()
        if empty:
            self._path.unlink(missing_ok=True)

    def _known(self) -> int:
        owner = self._owner_file.read()
        return owner.epoch if owner else 0

    def _take_over(self, above: int) -> int:
        """Create a file with a new number, and become the owner. Returns the epoch of the owner before; 0 for none."""
        with self._owner_file.locked():
            known = self._known()
            number, path, descriptor = self._create(max(above, known))
            try:
                owner = self._owner_file.claim(number)
            except BaseException:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        self.epoch, self._path, self._descriptor, self._owner = number, path, descriptor, owner
        return known

    def _create(self, above: int) -> tuple[int, Path, int]:
        # An empty file was withdrawn, or somebody else made it: it counts for nothing.
        files, _ = files_in(self._folder)
        written = (epoch for epoch, path in files.items() if path.stat().st_size)
        epoch = max(above, *written, 0) + 1
        while True:
            try:
                path = self._folder / file_name(epoch)
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                epoch += 1
                continue
            sync_folder(self._folder)
            return epoch, path, descriptor

    def _write_tip(self, crc: str) -> None:
        """Say which line is the last one. It is not synced: a crash may leave an older line there, never a newer."""
        try:
            if self._tip < 0:
                self._tip = os.open(
                    tip_path(self._folder), os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
                )
            os.pwrite(self._tip, tip_text(self.epoch, self._end.seq, crc), 0)
        except OSError as error:  # the line itself is safe
            log.warning("%s cannot be written: %s", tip_path(self._folder), error)


def _read_back(event: Any, vocabulary: Vocabulary) -> Any:
    """The event as a reader of its line gets it."""
    fields = _without_infinity(vocabulary.encode(event))
    check_limits(fields)
    # A half of a surrogate pair is no text. It becomes a question mark: the event matters more than that character.
    text = json.dumps(fields, allow_nan=False, ensure_ascii=False).encode(errors="replace")
    if len(text) > LONGEST_LINE:
        raise ValueError(f"it has {len(text)} bytes, and a line at most {LONGEST_LINE}")
    return vocabulary.decode(json.loads(text))


def _without_infinity(value: Any) -> Any:
    """The value with null for each number that JSON does not have. Where a number is needed, `decode` refuses null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_infinity(item) for name, item in cast("dict[str, Any]", value).items()}
    return [_without_infinity(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value


def _completed(
    first: Reading, folder: Path, known: int, vocabulary: Vocabulary
) -> tuple[list[Entry], list[str], Position]:
    """The whole journal: what was read before the takeover, and what its owner wrote until then."""
    try:
        rest = scan(folder, first.end, known, vocabulary=vocabulary)
    except SnapshotInDoubt:  # a third process took over meanwhile
        rest = scan(folder, known=known, vocabulary=vocabulary)
        return rest.entries, rest.notes, rest.end
    return first.entries + rest.entries, list(dict.fromkeys(first.notes + rest.notes)), rest.end


def _line(entry: Entry, previous: str = "", vocabulary: Vocabulary = LINEAGE) -> bytes:
    head = {"v": VERSION, "seq": entry.seq, "epoch": entry.epoch, "ts": to_iso(entry.ts)}
    chained = {"prev": previous} if previous else {}
    fields = head | vocabulary.encode(entry.event) | chained
    body = json.dumps(fields, allow_nan=False, ensure_ascii=False)[:-1].encode()
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


def _crc_of(line: bytes) -> str:
    return line[-11:-3].decode()
