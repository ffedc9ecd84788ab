"""The snapshot: a lineage's state beside its journal, with the proof of which lines it was made from.

It only saves time. A reader throws it away at any doubt and reads the whole journal: when the file is damaged or of
another version of the code, when a journal file that it covers has changed, or when the journal does not go on after
the last line that it covers.
"""

from __future__ import annotations

import gc
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from opt_ops.contract.files import write_durably
from opt_ops.core.codec import plain, reader_of
from opt_ops.core.state.model import State
from opt_ops.runfolder.files import open_regular, read_bytes
from opt_ops.runfolder.journal_reader import Position, file_name, files_in, parse

VERSION = 1
EVERY_EVENTS = 1000
"""Between two snapshots of a daemon: so many lines are read in less than 0.1 s."""

_LARGEST = 512 * 1024 * 1024  # bytes
_CORE = Path(__file__).parents[1] / "core"
_NOT_A_SNAPSHOT = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError)


def path_of(journal: Path) -> Path:
    """The snapshot of a journal folder."""
    return journal.with_name(f"{journal.name}.snapshot.json")


def save(journal: Path, state: State, end: Position) -> None:
    """Write the snapshot of the state after the line at `end`.

    Raises:
        OSError: it cannot be written. The old one stays.
    """
    body = json.dumps(plain(state), allow_nan=False, ensure_ascii=False)
    header = {
        "v": VERSION,
        "code": code_version(),
        "seq": end.seq,
        "epoch": end.epoch,
        "crc": end.crc,
        "offset": end.offset,
        "line": end.line,
        "files": _identities(journal, end),
        "body": f"{zlib.crc32(body.encode()):08x}",
    }
    write_durably(path_of(journal), f"{json.dumps(header)}\n{body}\n")


def load(journal: Path) -> tuple[State, Position] | None:
    """Return the state of the snapshot and the line that it ends with; None at any doubt."""
    with suppress(*_NOT_A_SNAPSHOT), _without_collection():
        header_text, _, body = read_bytes(path_of(journal), _LARGEST, orders=True).partition(b"\n")
        header = json.loads(header_text)
        end = Position(
            seq=header["seq"], epoch=header["epoch"], crc=header["crc"], offset=header["offset"], line=header["line"]
        )
        body = body.removesuffix(b"\n")
        known = header["v"] == VERSION and header["code"] == code_version()
        whole = known and header["body"] == f"{zlib.crc32(body):08x}"
        if whole and header["files"] == _identities(journal, end) and _ends_with(journal, end):
            state = cast("State", reader_of(State)(json.loads(body.decode()), "state"))
            if (state.seq, state.epoch) == (end.seq, end.epoch):
                return state, end
    return None


@contextmanager
def _without_collection() -> Iterator[None]:
    """Hundreds of thousands of objects are made and none is dropped: searching them for garbage takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def code_version() -> str:
    """The checksum of the code that decides what a state is: another fold may give another state."""
    sources = [*sorted((_CORE / "state").glob("*.py")), *sorted((_CORE / "events").glob("*.py"))]
    crc = 0
    for source in (*sources, *(_CORE / name for name in ("values.py", "codec.py", "versions.py"))):
        crc = zlib.crc32(source.read_bytes(), crc)
    return f"{crc:08x}"


def _identities(journal: Path, end: Position) -> list[list[Any]]:
    """Name, inode, size and time of each file that is covered; of the last one, which still grows, name and inode."""
    found: list[list[Any]] = []
    for epoch, path in sorted(files_in(journal)[0].items()):
        stat = path.stat()
        if epoch < end.epoch:
            found.append([path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns])
        elif epoch == end.epoch:
            found.append([path.name, stat.st_ino])
    return found


_LONGEST_LINE = 8 * 1024 * 1024  # bytes; twice what is written


def _ends_with(journal: Path, end: Position) -> bool:
    """Whether the line that ends at the offset is the one with that number and checksum."""
    descriptor = open_regular(journal / file_name(end.epoch))
    try:
        size = 4096
        while True:
            begin = max(0, end.offset - size)
            data = os.pread(descriptor, end.offset - begin, begin)
            _, newline, line = data[:-1].rpartition(b"\n")
            if newline or not begin or size > _LONGEST_LINE:
                break
            size *= 8
    finally:
        os.close(descriptor)
    if len(data) != end.offset - begin or data[-1:] != b"\n":
        return False
    fields = parse(line)
    return fields is not None and (fields["seq"], fields["epoch"], fields["crc"]) == (end.seq, end.epoch, end.crc)
