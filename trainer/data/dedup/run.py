"""The run: pieces of work for several processes, and what an interrupted run had done already.

Beside the folder that is asked for, ``DIR.part`` holds the sketches of finished pieces. The same command goes on from
them. The result does not depend on the number of processes or on what was interrupted.
"""

import fcntl
import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from opt_ops.contract.files import sha256, write_durably
from trainer.data.corpus import Document, Span, jsonl_files, located, whole
from trainer.data.dedup.decide import Documents, removals
from trainer.data.dedup.output import Source, write
from trainer.data.dedup.sketch import BANDS, PERMUTATIONS, CommonRuns, Sketches, common_runs, sketch
from trainer.data.dedup.words import RUN, Hashes, jaccard, run_set, words
from trainer.data.lines import text_of
from trainer.data.tokens.builder import cut
from trainer.errors import UserError

_ATTEMPTS = 3  # of a piece whose process was killed, as by the kernel for its memory
_SETS_KEPT = 256  # of documents that were compared last: copies often come in a row


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for. ``threshold`` is the Jaccard index from which on two documents are near copies."""

    inputs: tuple[Path, ...]
    out: Path
    against: tuple[Path, ...] = ()
    known: tuple[Path, ...] = ()  # older corpora: their documents are duplicates, and not written again
    threshold: float = 0.95
    seed: int = 1
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a document is."""

    source: Source
    offset: int


@dataclass(kw_only=True)
class _Found:
    """The documents of some files, in order."""

    places: list[Place] = field(default_factory=list)
    sketches: list[Sketches] = field(default_factory=list)


def run(options: Options, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write the folder of the texts that stay; return what ``dedup.json`` says.

    Raises:
        UserError: the folder exists, an input is not what it should be, or another run is at work on the same folder.
    """
    began = time.monotonic()
    if options.out.exists():
        raise UserError(f"{options.out} exists already. Name a folder that does not exist.")
    sources = {
        "input": _sources(options.inputs),
        "against": _sources(options.against),
        "known": _sources(options.known),
    }
    _require_different_names(sources["input"])
    about = _about(options, sources)
    part = options.out.with_name(f"{options.out.name}.part")
    with _alone(part, about):
        tests = common_runs([words(text) for source in sources["against"] for text in _tests(source.path)])
        found = {
            role: _sketched(part, role, files, tests if role == "input" else None, options, progress)
            for role, files in sources.items()
        }
        everything = [found["against"], found["known"], found["input"]]
        places = [place for each in everything for place in each.places]
        sets = _Sets(places)
        gone = list(removals(_documents(everything), options.threshold, sets.jaccard))
        progress(f"{len(gone):,} of {len(found['input'].places):,} documents go")
        report = write(part / "out", sources["input"], places, gone, found["input"].sketches, about)
        report["seconds"] = round(time.monotonic() - began, 1)
        write_durably(part / "out" / "dedup.json", json.dumps(report, indent=1) + "\n")
        (part / "out").rename(options.out)
    shutil.rmtree(part)
    return report


def _sources(paths: Sequence[Path]) -> list[Source]:
    """The files among ``paths``, in order, each with the name that it gets in the folder."""
    found: list[Source] = []
    for path in paths:
        for file in jsonl_files([path]):
            name = str(file.relative_to(path)) if path.is_dir() else file.name
            found.append(Source(path=file, name=name, sha256=sha256(file)))
    return found


def _require_different_names(sources: Sequence[Source]) -> None:
    names: dict[str, Path] = {}
    for source in sources:
        if source.name in names:
            raise UserError(
                f"{names[source.name]} and {source.path} would both become {source.name}. Name the folder above them, "
                "or rename one."
            )
        names[source.name] = source.path


def _about(options: Options, sources: dict[str, list[Source]]) -> dict[str, Any]:
    listed = {
        role: [{"path": str(source.path), "sha256": source.sha256} for source in files]
        for role, files in sources.items()
    }
    return {
        "v": 1,
        "engine": f"rensa {version('rensa')}",
        "threshold": options.threshold,
        "shingle": f"{RUN} words",
        "permutations": PERMUTATIONS,
        "bands": BANDS,
        "seed": options.seed,
        "inputs": listed["input"],
        "against": listed["against"],
        "against_duplicates": listed["known"],
    }


@contextmanager
def _alone(part: Path, about: dict[str, Any]) -> Iterator[None]:
    """Hold the folder of the unfinished run; what another command has left there is removed."""
    part.mkdir(parents=True, exist_ok=True)
    with (part / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work on {part}. Wait for it, or name another folder.") from None
        wanted = json.dumps(about, sort_keys=True)
        known = part / "arguments.json"
        if not known.is_file() or known.read_text() != wanted:
            for left in part.glob("*.npz"):
                left.unlink()
            write_durably(known, wanted)
        shutil.rmtree(part / "out", ignore_errors=True)
        yield


def _sketched(
    part: Path,
    role: str,
    sources: Sequence[Source],
    tests: CommonRuns | None,
    options: Options,
    progress: Callable[[str], None],
) -> _Found:
    """Sketch all documents of some files, in as many processes as are asked for."""
    pieces = cut([source.path for source in sources])
    files = [part / f"{role}-{number:05d}.npz" for number in range(len(pieces))]
    tests = tests or common_runs([])
    for left in range(_ATTEMPTS - 1, -1, -1):
        todo = [(piece, file) for piece, file in zip(pieces, files, strict=True) if not file.is_file()]
        try:
            for done in _sketch_all(todo, tests, options):
                progress(f"{role}: {done} of {len(todo)} pieces")
            break
        except BrokenProcessPool:
            if not left:
                raise UserError(f"processes were killed {_ATTEMPTS} times. Use fewer --workers.") from None
            progress("a process was killed: its pieces are done again")
    of_path = {source.path: source for source in sources}
    found = _Found()
    for piece, file in zip(pieces, files, strict=True):
        each = Sketches.read(file)
        found.sketches.append(each)
        found.places += [
            Place(source=of_path[piece[span].path], offset=int(offset))
            for span, offset in zip(each.spans, each.offsets, strict=True)
        ]
    return found


def _sketch_all(todo: Sequence[tuple[Sequence[Span], Path]], tests: CommonRuns, options: Options) -> Iterator[int]:
    """Sketch pieces; after each, how many are done."""
    if options.workers == 1:
        for done, (piece, file) in enumerate(todo, 1):
            _sketch_piece(piece, file, tests, options.seed)
            yield done
    elif todo:
        with ProcessPoolExecutor(options.workers, mp_context=get_context("forkserver")) as pool:
            futures = [pool.submit(_sketch_piece, piece, file, tests, options.seed) for piece, file in todo]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                yield done


def _sketch_piece(piece: Sequence[Span], file: Path, tests: CommonRuns, seed: int) -> None:
    sketch(piece, tests, seed).save(file)


def _documents(found: Sequence[_Found]) -> Documents:
    each = [sketches for part in found for sketches in part.sketches]
    return Documents(
        tests=len(found[0].places),
        known=len(found[1].places),
        digests=np.concatenate([np.zeros((0, 32), np.uint8), *(one.digests for one in each)]),
        sizes=np.concatenate([np.zeros(0, np.int32), *(one.sizes for one in each)]),
        bands=np.concatenate([np.zeros((0, BANDS), np.uint64), *(one.bands for one in each)]),
        shared=np.concatenate([np.zeros(0, np.int64), *(one.shared for one in each)]),
    )


class _Sets:
    """The sets of documents, read from the files again when two are compared."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._kept: OrderedDict[int, Hashes] = OrderedDict()

    def jaccard(self, one: int, other: int) -> float:
        """The Jaccard index of two documents."""
        return jaccard(self._of(one), self._of(other))

    def _of(self, number: int) -> Hashes:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        place = self._places[number]
        with place.source.path.open("rb") as file:
            file.seek(place.offset)
            text, why = text_of(file.readline())
        if text is None:
            raise UserError(f"{place.source.path} has changed while it was read: {why}.")
        found = self._kept[number] = run_set(text)
        if len(self._kept) > _SETS_KEPT:
            self._kept.popitem(last=False)
        return found


def _tests(path: Path) -> list[str]:
    """The texts of a file that must not be trained on. Without any, all documents would pass as clean."""
    texts = list(_texts(path))
    if not texts:
        raise UserError(
            f'--against {path}: no line has a text, such as {{"text": "…"}}. Nothing can be compared with it.'
        )
    return texts


def _texts(path: Path) -> Iterator[str]:
    for each in located(whole(path)):
        if isinstance(each, Document):
            yield each.text
