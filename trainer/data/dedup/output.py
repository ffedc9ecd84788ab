"""The folder that is written: the lines that stay, byte for byte, and what was removed with the reason."""

import gzip
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.data.dedup.decide import Removal, Why
from trainer.data.dedup.sketch import Sketches


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that is read, and its name in the folder."""

    path: Path
    name: str
    sha256: str


class _Place(Protocol):
    @property
    def source(self) -> Source: ...
    @property
    def offset(self) -> int: ...


def write(
    folder: Path,
    sources: Sequence[Source],
    places: Sequence[_Place],
    gone: Sequence[Removal],
    sketches: Sequence[Sketches],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write the folder; return what ``dedup.json`` says of it, without the time that it took.

    Args:
        folder: does not exist.
        sources: the files of the input, in order.
        places: of all documents; those of the input are the last ones.
        gone: the documents that go, in order.
        sketches: of the input.
        about: how it was decided.
    """
    folder.mkdir()
    documents = sum(len(each.offsets) for each in sketches)
    left_out = {removal.document for removal in gone}
    stay: defaultdict[Path, list[int]] = defaultdict(list)
    for number in range(len(places) - documents, len(places)):
        if number not in left_out:
            stay[places[number].source.path].append(places[number].offset)
    digest = hashlib.sha256()
    for source in sources:
        _write_lines(folder / source.name, source.path, stay[source.path], digest)
    lines = _Lines()
    removed = list(_removed(places, gone, lines))
    corrupt = [line for each in sketches for line in each.corrupt]
    removed += [
        {"document": f"{line.path}:{line.line}", "kept": None, "why": "corrupt", "cause": line.why} for line in corrupt
    ]
    _write_packed(folder / "removed.jsonl.gz", removed)
    number = Counter(removal.why for removal in gone)
    return {
        **about,
        "documents_in": documents + len(corrupt),
        "documents_out": documents - len(gone),
        "removed": {**{str(why): number[why] for why in Why}, "corrupt": len(corrupt)},
        "contaminated": _by_test(places, gone),
        "digest": f"sha256:{digest.hexdigest()}",
    }


def _write_lines(target: Path, path: Path, offsets: Sequence[int], digest: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as source, target.open("wb") as file:
        for offset in offsets:
            source.seek(offset)
            line = source.readline()
            line = line if line.endswith(b"\n") else line + b"\n"  # the last line of a file may have no end
            digest.update(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _write_packed(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As JSON lines; the same bytes for the same rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with target.open("wb") as file:
        file.write(gzip.compress(text.encode(), mtime=0))
        file.flush()
        os.fsync(file.fileno())


def _removed(places: Sequence[_Place], gone: Sequence[Removal], lines: "_Lines") -> Iterator[dict[str, Any]]:
    for removal in gone:
        row: dict[str, Any] = {
            "document": lines.named(places[removal.document]),
            "kept": lines.named(places[removal.other]),
            "why": str(removal.why),
        }
        if removal.jaccard is not None:
            row["jaccard"] = round(removal.jaccard, 6)
        if removal.words is not None:
            row["words"] = removal.words
        yield row


def _by_test(places: Sequence[_Place], gone: Sequence[Removal]) -> dict[str, int]:
    """How many documents were removed because of each file of test texts."""
    found = Counter(str(places[each.other].source.path) for each in gone if each.why is Why.CONTAMINATED)
    return dict(sorted(found.items()))


class _Lines:
    """Numbers of lines by their bytes."""

    def __init__(self) -> None:
        self._ends: dict[Path, list[int]] = {}

    def named(self, place: _Place) -> str:
        """`a.jsonl:17`."""
        path = place.source.path
        if path not in self._ends:
            with path.open("rb") as file:
                end, ends = 0, [0]
                for line in file:
                    end += len(line)
                    ends.append(end)
            self._ends[path] = ends
        return f"{path}:{bisect_right(self._ends[path], place.offset)}"
