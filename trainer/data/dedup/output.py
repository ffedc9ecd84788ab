"""The folder that is written: the lines that stay, byte for byte, and what was removed with the reason."""

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opt_ops.contract.files import sync_folder
from trainer.data.corpus import newlines
from trainer.data.dedup.candidates import Candidates
from trainer.data.dedup.decide import Removal, Why
from trainer.data.dedup.pieces import Piece, Source, Survey, kept
from trainer.data.dedup.sketch import Sketches


def write(
    folder: Path,
    sources: Sequence[Source],
    pieces: Sequence[Piece],
    survey: Survey,
    candidates: Candidates,
    gone: Sequence[Removal],
) -> dict[str, Any]:
    """Write the folder; return what ``dedup.json`` says of the result.

    Args:
        folder: does not exist.
        sources: the files of the input, in order.
        pieces: all of them.
        survey: of the pieces.
        candidates: the documents of which ``gone`` names rows.
        gone: the documents that go, in order.
    """
    folder.mkdir()
    digest = hashlib.sha256()
    for source in sources:
        (folder / source.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / source.name).touch()  # an empty file has no lines, and is in no piece
    names = {source.path: source.name for source in sources}
    numbers = candidates.numbers[[removal.row for removal in gone]]
    for path, parts in groupby(kept(pieces, survey, numbers), itemgetter(0)):
        with path.open("rb") as file, (folder / names[path]).open("wb") as target:
            for _, offsets in parts:
                _write_lines(target, file, offsets, digest)
            target.flush()
            os.fsync(target.fileno())
    with (folder / "removed.jsonl.gz").open("wb") as file:
        _write_packed(file, chain(_removed(candidates, gone), _corrupt(pieces)))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    number = Counter(removal.why for removal in gone)
    return {
        "documents_in": survey.documents + survey.corrupt,
        "documents_out": survey.documents - len(gone),
        "removed": {**{str(why): number[why] for why in Why}, "corrupt": survey.corrupt},
        "contaminated": _by_test(candidates, gone),
        "digest": f"sha256:{digest.hexdigest()}",
    }


def _write_lines(target: BinaryIO, source: BinaryIO, offsets: NDArray[np.int64], digest: Any) -> None:
    for offset in offsets.tolist():
        source.seek(offset)
        line = source.readline()
        line = line if line.endswith(b"\n") else line + b"\n"  # the last line of a file may have no end
        digest.update(line)
        target.write(line)


def _write_packed(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    """As JSON lines; the same bytes for the same rows, without a time or a name."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        for row in rows:
            # a name that is not UTF-8 becomes an escape that JSON reads
            packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def _removed(candidates: Candidates, gone: Sequence[Removal]) -> Iterator[dict[str, Any]]:
    names = _names(candidates, {row for removal in gone for row in (removal.row, removal.other)})
    for removal in gone:
        row: dict[str, Any] = {
            "document": names[removal.row],
            "kept": names[removal.other],
            "why": str(removal.why),
        }
        if removal.jaccard is not None:
            row["jaccard"] = round(removal.jaccard, 6)
        if removal.words is not None:
            row["words"] = removal.words
        yield row


def _names(candidates: Candidates, rows: set[int]) -> dict[int, str]:
    """File and line of some documents, `a.jsonl:17`."""
    names: dict[int, str] = {}
    before, position, line = None, 0, 1
    for row in sorted(rows):  # so documents of a file follow one another, in order
        path, offset = candidates.place(row)
        if path != before:
            before, position, line = path, 0, 1
        line += newlines(path, position, offset)
        position = offset
        names[row] = f"{path}:{line}"
    return names


def _corrupt(pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
    for piece in pieces:
        if piece.role == "input":
            for line in Sketches.read(piece.sketches).corrupt:
                yield {"document": f"{line.path}:{line.line}", "kept": None, "why": "corrupt", "cause": line.why}


def _by_test(candidates: Candidates, gone: Sequence[Removal]) -> dict[str, int]:
    """How many documents were removed because of each file of test texts."""
    found = Counter(str(candidates.place(each.other)[0]) for each in gone if each.why is Why.CONTAMINATED)
    return dict(sorted(found.items()))
