"""Brings back a lineage whose journal cannot be trusted: as far as it can be known, and no further.

What comes after the last good line is set aside, whole files, and the journal goes on from that line in a new file.
Nothing is guessed, and nothing is deleted. A person decides.
"""

from __future__ import annotations

import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from opt_ops.core.events import NoteAdded
from opt_ops.errors import Refused
from opt_ops.runfolder import snapshot
from opt_ops.runfolder.files import write_text
from opt_ops.runfolder.journal import Journal
from opt_ops.runfolder.journal_reader import (
    JournalError,
    Position,
    content,
    files_in,
    read,
    read_tip,
    replayed,
    scan,
    tip_path,
)
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.owner import HIGHEST_EPOCH, OwnerFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What is wrong with a journal, and what a repair would set aside."""

    why: str
    good: Position
    lines: int
    files: tuple[str, ...]
    epoch: int
    """That the repaired journal goes on with: above all that anybody has seen."""

    def __str__(self) -> str:
        return (
            f"{self.why}. The last good line is seq {self.good.seq}. "
            f"{self.lines} lines after it are set aside ({', '.join(self.files) or 'no file'})"
        )


def find(lineage: Path) -> Damage | None:
    """Return what is wrong with a lineage's journal; None if it can be trusted.

    Raises:
        Refused: a newer version of opt-ops wrote it; nothing of it is damaged.
        OSError: it cannot be read.
    """
    folder = lineage / "journal"
    try:
        replayed(folder, read(folder)[0])
    except JournalError as error:
        if error.newer:
            raise Refused(str(error), error.hint) from error
        good = _last_good(folder, error)
        later = {epoch: path for epoch, path in files_in(folder)[0].items() if epoch >= max(good.epoch, 1)}
        sizes = {path: content(path)[good.offset if epoch == good.epoch else 0 :] for epoch, path in later.items()}
        lost = {path.name: text.count(b"\n") + (text[-1:] not in (b"", b"\n")) for path, text in sizes.items()}
        return Damage(
            why=str(error),
            good=good,
            lines=sum(lost.values()),
            files=tuple(sorted(name for name, lines in lost.items() if lines)),
            epoch=_highest_seen(lineage) + 1,
        )
    return None


def repair(lineage: Path, damage: Damage, author: str) -> Path:
    """Set aside what comes after the last good line, and take the lineage over with a note that says so.

    Returns the folder with the files that were set aside.

    Raises:
        JournalError: the journal cannot be trusted still: somebody has changed it meanwhile.
        OSError: a file cannot be moved or written. The repair can be tried again.
    """
    folder, good = lineage / "journal", damage.good
    aside = lineage / f"journal.set-aside-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    aside.mkdir(mode=0o700, exist_ok=True)
    snapshot.path_of(folder).unlink(missing_ok=True)
    for epoch, path in files_in(folder)[0].items():
        if epoch > good.epoch:
            path.rename(aside / path.name)
        elif epoch == good.epoch:
            whole = content(path)
            if len(whole) > good.offset:
                shutil.copy2(path, aside / path.name)
                write_text(path, whole[: good.offset].decode())
    tip_path(folder).unlink(missing_ok=True)
    journal = Journal(folder, above=damage.epoch - 1)
    try:
        text = f"Journal repaired: {damage}. They are in {aside.name}. What happened since is not known."
        note = NoteAdded(request=str(uuid.uuid4()), author=author, target=lineage.name, text=text, correction=True)
        journal.append(journal.stamp(note, time.time()))
    finally:
        journal.close()
    return aside


def _last_good(folder: Path, error: JournalError) -> Position:
    """The last line that can be trusted, and whose event can follow on those before it."""
    reading = error.reading
    if reading is None:  # an event cannot follow: every line is whole
        return scan(folder, until=error.seq - 1).end if error.seq > 1 else Position()
    try:
        replayed(folder, reading.entries)
    except JournalError as earlier:
        return _last_good(folder, earlier)
    return reading.end


def _highest_seen(lineage: Path) -> int:
    """The highest epoch in files, in the owner file, in the tip, and in what node agents have reported."""
    folder = lineage / "journal"
    owner, tip = OwnerFile(folder).read(), read_tip(folder)
    seen = [*files_in(folder)[0], owner.epoch if owner else 0, tip.epoch if tip else 0]
    seen += [beat.orders[0] for beat in FileAgents(lineage).newest()]
    return max((epoch for epoch in seen if epoch < HIGHEST_EPOCH), default=0)
