"""The folders under `runs/`: which lineages exist, and the state of each by its journal."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ops.core.events import Entry, LineageStarted
from opt_ops.core.names import lineage_of
from opt_ops.core.state.model import State
from opt_ops.errors import NotFound, OptOpsError, UsageError
from opt_ops.runfolder import snapshot
from opt_ops.runfolder.files import folders_in
from opt_ops.runfolder.journal_reader import Reading, SnapshotInDoubt, read, replayed, scan
from opt_ops.runfolder.permissions import give_to_group, group_of, private

if TYPE_CHECKING:
    from opt_ops.ports import Request


_NUMBER = re.compile(r"[0-9]{1,9}")
_BEGINNING = 100  # lines of a journal: a lineage is started in its second one, unless daemons came and went before


def folders(runs: Path) -> list[Path]:
    """Return the folders of all lineages, by number.

    Raises:
        UsageError: `runs` is a file.
        OSError: it cannot be listed.
    """
    try:
        found = folders_in(runs, _NUMBER)
    except NotADirectoryError as error:
        why = f"runs: {runs} is a file, and must be a folder"
        raise UsageError(why, "set `runs` in opt-ops.toml to a folder") from error
    return sorted(found, key=lambda path: int(path.name))


def folder(runs: Path, identifier: str) -> Path:
    """Return the folder of a lineage, given its name or the name of one of its runs or attempts.

    Raises:
        UsageError: `identifier` is not such a name.
        NotFound: there is no such lineage.
    """
    try:
        name = lineage_of(identifier)
    except ValueError as error:
        raise UsageError(str(error), "opt-ops q -a lists all lineages") from error
    path = runs / name
    if not path.is_dir():
        known = ", ".join(p.name for p in folders(runs)) or "none"
        raise NotFound(f"no lineage {name} in {runs}; known: {known}", "opt-ops q lists them")
    return path


def entries(path: Path) -> list[Entry]:
    """Return the journal of a lineage.

    Raises:
        JournalError: it is damaged or of a newer version.
    """
    return read(path / "journal")[0]


def state(path: Path, keep: bool = False) -> State:
    """Return the state of a lineage: of its snapshot and the lines after it, or of its whole journal.

    With `keep`, a snapshot is written if the lineage has finished and has none that can be trusted, as after an
    upgrade: no daemon would write one any more.

    Raises:
        JournalError: the journal is damaged or of a newer version.
    """
    found, start, reading = _state_and_rest(path)
    if keep and found.finished and not start:
        with suppress(OSError, ValueError):  # the next reader reads the whole journal, too
            snapshot.save(path / "journal", found, reading.end)
    return found


def entries_after(path: Path, seq: int) -> list[Entry]:
    """Return the entries with a higher number, without reading those that a snapshot covers.

    Raises:
        JournalError: the journal is damaged or of a newer version.
    """
    _, start, reading = _state_and_rest(path)
    known = reading.entries if start <= seq else entries(path)
    return [entry for entry in known if entry.seq > seq]


def _state_and_rest(path: Path) -> tuple[State, int, Reading]:
    """The state, where its snapshot ends (0: there is none), and the reading after that."""
    folder = path / "journal"
    if (found := snapshot.load(folder)) is not None:
        base, end = found
        with suppress(SnapshotInDoubt):
            rest = scan(folder, end)
            return replayed(folder, rest.entries, base), end.seq, rest
    whole = scan(folder)
    return replayed(folder, whole.entries), 0, whole


def parent(path: Path) -> str | None:
    """Return the lineage that this one was forked from; None if it is no fork. Only its beginning is read.

    Raises:
        JournalError: the journal is damaged or of a newer version.
    """
    begun = scan(path / "journal", until=_BEGINNING).entries
    started = (entry.event for entry in begun if isinstance(entry.event, LineageStarted))
    return next((event.parent.lineage for event in started if event.parent is not None), None)


def children(path: Path) -> list[str]:
    """Return the lineages that were forked from this one, by number. One that cannot be read is left out."""
    found: list[str] = []
    for other in folders(path.parent):
        with suppress(OptOpsError):
            if parent(other) == path.name:
                found.append(other.name)
    return found


def create(runs: Path, group: str = "") -> Path:
    """Create a folder for the next lineage, for this user alone. Two callers at once get two numbers.

    Args:
        runs: The runs folder.
        group: Whose members may read the lineage; empty: nobody's.

    Raises:
        OptOpsError: there is no such group, or this user is no member of it.
    """
    with private(group):
        runs.mkdir(parents=True, exist_ok=True)
    number = next_number(runs)
    while not claim(path := runs / str(number), group):
        number += 1
    return path


def next_number(runs: Path) -> int:
    """The number that the next lineage has, unless somebody takes it meanwhile."""
    return max((int(path.name) for path in folders(runs)), default=0) + 1


def claim(path: Path, group: str = "") -> bool:
    """Create the folder of a lineage, for this user alone. Returns whether this call created it.

    Raises:
        OptOpsError: there is no such group, or this user is no member of it.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    if group:
        try:
            give_to_group(path, group)
        except OptOpsError:
            path.rmdir()  # who tries again would leave one more each time
            raise
    return True


def ask(path: Path, author: str, verb: str, arguments: Mapping[str, Any], ts: float, identifier: str = "") -> Request:
    """Leave a request in the inbox of a lineage, or of a campaign, for the daemon. Returns it.

    With `identifier`, asking twice is asking once: the journal takes each only once.
    """
    from opt_ops.ports import Request
    from opt_ops.runfolder.inbox import FileInbox

    request = Request(request=identifier or str(uuid.uuid4()), author=author, verb=verb, arguments=arguments)
    with private(group_of(path)):
        FileInbox(path).put(request, ts)
    return request
