"""datatrove's MinHash for text that one machine cannot hold: its first two steps, signatures and buckets.

Its buckets give candidates. Its third step is not used: it joins chains of candidates into one cluster, of which one
document stays, and compares nothing. Which documents go is decided as with rensa (:mod:`.decide`).
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from trainer.data.dedup.candidates import Groups, Numbers, chained
from trainer.data.dedup.pieces import Piece, Survey
from trainer.data.dedup.processes import run_all
from trainer.data.dedup.sketch import NO_RUNS, PERMUTATIONS, Examination, read_common_runs
from trainer.data.dedup.slurm import require_slurm, run_jobs
from trainer.data.dedup.words import RUN, Hashes, found_words
from trainer.data.dedup.work import Work

_RUNS_AT_ONCE = 1 << 14  # datatrove's table of them has 128 columns of 8 bytes: 16 MiB
_RECORDS_AT_ONCE = 1000  # of each piece, while buckets are merged


class Words(WordTokenizer):
    r"""Splits at what is not ``\w``. datatrove's own one is spaCy's: it is slow, and finds other words."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words, as :mod:`.words` defines them."""
        return [word.lower() for word in found_words(text)]

    def sent_tokenize(self, text: str) -> list[str]:
        """All of it is one sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """All of it is one sentence."""
        return [(0, len(text))]


class _Text(str):
    """In place of a document's text: its runs, which are known already."""

    __slots__ = ("runs",)
    runs: Hashes


class Signatures(MinhashDedupSignature):
    """Reads the pieces, examines each document, and writes datatrove's signatures of it."""

    def __init__(self, pieces: tuple[Piece, ...], tests: Path, output_folder: str, config: MinhashConfig) -> None:
        """``tests``: the file of the runs that no document may share."""
        super().__init__(output_folder, config, language=Words())  # pyright: ignore[reportArgumentType]
        self._pieces = pieces
        self._tests = tests

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Work on the piece of this number. ``data`` is None, as for each first step."""
        assert data is None
        piece = self._pieces[rank]
        examination = Examination(piece.spans, read_common_runs(self._tests) if piece.role == "input" else NO_RUNS)
        super().run(self._documents(examination), rank, world_size)
        for band in range(self.config.num_buckets):
            _sync(f"{self.output_folder.path}/bucket_{band:03d}/{rank:05d}.minhash.sig")
        examination.sketches().save(piece.sketches)

    def _documents(self, examination: Examination) -> Iterator[Document]:
        for number, runs in enumerate(examination.sets()):
            text = _Text()
            text.runs = runs
            yield Document(text=text, id=str(number))

    def get_shingles(self, text: str) -> Hashes:
        """The runs of words that are compared later, and not datatrove's, which leaves out documents of fewer words."""
        assert isinstance(text, _Text)
        return text.runs.reshape(-1, 1)

    def get_signature(self, shingles: Hashes) -> list[list[int]]:
        """As datatrove's, a part at a time: a book would fill the memory."""
        parts = [
            super(Signatures, self).get_signature(shingles[begin : begin + _RUNS_AT_ONCE])
            for begin in range(0, len(shingles), _RUNS_AT_ONCE)
        ]
        return parts[0] if len(parts) == 1 else np.min(parts, axis=0).tolist()


class Buckets(MinhashDedupBuckets):
    """datatrove's, whose result is on the disk before the task counts as done: an empty file would say: no copies."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Work on the band of this number."""
        super().run(data, rank, world_size)
        _sync(f"{self.output_folder.path}/{rank:05d}_00.dups")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sketch_all(work: Work) -> None:
    """Let datatrove work on what is left to do.

    Raises:
        UserError: an input is not what it should be, or Slurm refuses the jobs.
        ChildProcessError: jobs ended without a result.
    """
    if not work.pieces:
        return
    if work.options.slurm is not None:
        require_slurm()
    folder = str(work.folder.resolve())
    config = MinhashConfig(
        n_grams=RUN,
        num_buckets=work.bands,
        hashes_per_bucket=PERMUTATIONS // work.bands,
        seed=work.options.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # its default asks for xxhash; none of them is used here
    )
    pieces = tuple(work.pieces)
    signatures = Signatures(pieces, work.tests, f"{folder}/signatures", config)
    buckets = Buckets(f"{folder}/signatures", f"{folder}/links", config=config, lines_to_buffer=_RECORDS_AT_ONCE)
    _run(work, "signatures", signatures, len(pieces), 1)
    _run(work, "buckets", buckets, work.bands, -(-work.bands // len(pieces)))  # no more jobs than there were before


def groups(work: Work, surveyed: Survey) -> Groups:
    """Which documents agree in a band."""

    def links(band: int) -> tuple[Numbers, Numbers]:
        found = np.fromfile(work.folder / f"links/{band:05d}_00.dups", "<u4").reshape(-1, 4).astype(np.int64)
        return surveyed.starts[found[:, 0]] + found[:, 1], surveyed.starts[found[:, 2]] + found[:, 3]

    return chained([lambda band=band: links(band) for band in range(work.bands if work.pieces else 0)])


def _run(work: Work, stage: str, step: PipelineStep, tasks: int, tasks_per_job: int) -> None:
    log = str(work.folder.resolve() / f"{stage}.log")
    if work.options.slurm is not None:
        run_jobs(work, stage, step, log, tasks, tasks_per_job)
        return
    executor = LocalPipelineExecutor([step], tasks, logging_dir=log)
    # not its run(): that waits forever for a process that was killed
    run_all(
        _run_task,
        lambda: [(executor, rank) for rank in executor.get_incomplete_ranks()],
        work.options.workers or 1,
        lambda line: work.progress(f"{stage}: {line}"),
    )


def _run_task(executor: PipelineExecutor, rank: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # all of it is in the task's log as well
        executor._run_for_rank(rank, local_rank=1)  # noqa: SLF001  (datatrove's subclasses call it so)
