"""The run: what is read, what an interrupted run had done already, and the folder that is written.

Beside the folder that is asked for, ``DIR.part`` holds the sketches of finished pieces. The same command goes on from
them. The result does not depend on the engine, on the number of processes, or on what was interrupted.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from opt_ops.contract.files import sync_folder, write_durably
from trainer.data.corpus import Document, Span, located, whole
from trainer.data.dedup.candidates import Candidates, Groups, candidates, grouped
from trainer.data.dedup.decide import removals
from trainer.data.dedup.output import write
from trainer.data.dedup.pieces import (
    Piece,
    Source,
    Survey,
    cut,
    require_different_names,
    require_outside,
    sources,
    survey,
)
from trainer.data.dedup.processes import run_all
from trainer.data.dedup.sketch import (
    NO_RUNS,
    PERMUTATIONS,
    Sketches,
    bands_for,
    common_runs,
    read_common_runs,
    sketch,
)
from trainer.data.dedup.words import RUN, Hashes, jaccard, run_set, words
from trainer.data.dedup.work import Options, Work
from trainer.errors import UserError

_RUNS_KEPT = 1 << 23  # of documents that were compared last, 8 bytes each: copies often come in a row


def run(options: Options, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write the folder of the texts that stay; return what ``dedup.json`` says.

    Raises:
        UserError: the folder exists, an input is not what it should be, or another run is at work on the same folder.
        ChildProcessError: jobs ended without a result.
    """
    began = time.monotonic()
    if os.path.lexists(options.out):  # a link that leads nowhere, too
        raise UserError(f"{options.out} exists already. Name a folder that does not exist.")
    require_outside(options.out, [*options.inputs, *options.against, *options.known])
    of_role = {
        "against": sources(options.against, once=False),
        "known": sources(options.known, once=False),
        "input": sources(options.inputs, once=True),
    }
    require_different_names(of_role["input"])
    before = _versions(of_role)
    about = _about(options, of_role)
    part = options.out.with_name(f"{options.out.name}.part")
    with _alone(part):
        work = _begin(part, of_role, about, options, progress)
        groups, surveyed = _found(work)
        table = candidates(work.pieces, surveyed, groups)
        gone = list(removals(table, options.threshold, _Sets(table).jaccard))
        progress(f"{len(gone):,} of {surveyed.documents:,} documents go; removed.jsonl.gz says which, and why")
        result = work.folder / "out"
        shutil.rmtree(result, ignore_errors=True)
        report = about | write(result, of_role["input"], work.pieces, surveyed, table, gone)
        report["seconds"] = round(time.monotonic() - began, 1)
        write_durably(result / "dedup.json", json.dumps(report, indent=1) + "\n")
        if _versions(of_role) != before:
            raise UserError("files changed while they were read. Give the command again when they are complete.")
        result.rename(options.out)
        sync_folder(options.out.parent)
        shutil.rmtree(work.folder, ignore_errors=True)
    (part / "lock").unlink()
    with suppress(OSError):  # something else is in it
        part.rmdir()
    return report


def _versions(of_role: dict[str, list[Source]]) -> list[tuple[int, int]]:
    found = [source.path.stat() for files in of_role.values() for source in files]
    return [(each.st_size, each.st_mtime_ns) for each in found]


def _about(options: Options, of_role: dict[str, list[Source]]) -> dict[str, Any]:
    listed = {
        role: [{"path": str(source.path), "sha256": source.sha256} for source in files]
        for role, files in of_role.items()
    }
    return {
        "v": 1,
        "engine": f"{options.engine} {version(options.engine)}",
        "threshold": options.threshold,
        "shingle": f"{RUN} words",
        "permutations": PERMUTATIONS,
        "bands": bands_for(options.threshold),
        "seed": options.seed,
        "inputs": listed["input"],
        "against": listed["against"],
        "against_duplicates": listed["known"],
    }


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Hold the folder of the unfinished run."""
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{part} cannot be made: {error.strerror}. Name another --out.") from error
    with (part / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work on {part}. Wait for it, or name another folder.") from None
        yield


def _begin(
    part: Path,
    of_role: dict[str, list[Source]],
    about: dict[str, Any],
    options: Options,
    progress: Callable[[str], None],
) -> Work:
    """The pieces of work. What another command has left is removed: its folder has another name."""
    spans = [(str(span.path), span.begin, span.end) for piece in cut(of_role, part) for span in piece.spans]
    name = hashlib.sha256(json.dumps([about, spans]).encode()).hexdigest()[:16]
    for left in part.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}", left.name) and left.name != name:
            shutil.rmtree(left, ignore_errors=True)
    folder = part / name
    folder.mkdir(exist_ok=True)
    tests = common_runs([words(text) for source in of_role["against"] for text in _tests(source.path)])
    tests.save(folder / "tests.npz")
    return Work(
        folder=folder,
        pieces=cut(of_role, folder),
        tests=folder / "tests.npz",
        bands=bands_for(options.threshold),
        options=options,
        progress=progress,
    )


def _tests(path: Path) -> list[str]:
    """The texts of a file that must not be trained on. Without any, all documents would pass as clean."""
    texts = [each.text for each in located(whole(path)) if isinstance(each, Document)]
    if not texts:
        raise UserError(
            f'--against {path}: no line has a text, such as {{"text": "…"}}. Nothing can be compared with it.'
        )
    return texts


def _found(work: Work) -> tuple[Groups, Survey]:
    """Let the engine work on what is left to do; which documents agree in a band, and how many there are."""
    if work.options.engine == "datatrove":
        from trainer.data.dedup import datatrove_steps

        datatrove_steps.sketch_all(work)
        surveyed = survey(work.pieces)
        return datatrove_steps.groups(work, surveyed), surveyed
    _sketch_all(work)
    bands = [Sketches.read(piece.sketches).bands for piece in work.pieces]
    return grouped(np.concatenate([np.zeros((0, work.bands), np.uint64), *bands])), survey(work.pieces)


def _sketch_all(work: Work) -> None:
    def left() -> list[tuple[Any, ...]]:
        return [
            (piece, work.tests, work.options.seed, work.bands) for piece in work.pieces if not piece.sketches.is_file()
        ]

    if (work.options.workers or 1) > 1:
        run_all(_sketch_piece, left, work.options.workers or 1, work.progress)
        return
    todo = left()
    for done, arguments in enumerate(todo, 1):
        _sketch_piece(*arguments)
        work.progress(f"{done} of {len(todo)} pieces")


def _sketch_piece(piece: Piece, tests: Path, seed: int, bands: int) -> None:
    common = read_common_runs(tests) if piece.role == "input" else NO_RUNS
    sketch(piece.spans, common, seed, bands).save(piece.sketches)


class _Sets:
    """The sets of candidates, read from the files again when two are compared."""

    def __init__(self, table: Candidates) -> None:
        self._table = table
        self._kept: OrderedDict[int, Hashes] = OrderedDict()
        self._runs = 0

    def jaccard(self, one: int, other: int) -> float:
        """The Jaccard index of two rows."""
        return jaccard(self._of(one), self._of(other))

    def _of(self, row: int) -> Hashes:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        path, offset = self._table.place(row)
        document = next(located(Span(path, offset, offset + 1)), None)
        if not isinstance(document, Document):
            raise UserError(f"{path} changed while it was read. Give the command again when it is complete.")
        found = self._kept[row] = run_set(document.text)
        self._runs += len(found)
        while self._runs > _RUNS_KEPT and len(self._kept) > 2:
            self._runs -= len(self._kept.popitem(last=False)[1])
        return found
