"""What is asked for, and what an engine is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.dedup.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for.

    Attributes:
        inputs: JSONL files and folders of them.
        out: the folder to write.
        against: texts that must not be trained on.
        known: older corpora: their documents are duplicates, and not written again.
        threshold: the Jaccard index from which on two documents are near copies.
        seed: of the MinHash.
        workers: processes at once; None for one with rensa, and for no limit on Slurm.
        engine: ``rensa`` or ``datatrove``.
        slurm: long options of sbatch, for datatrove's tasks as jobs; None for processes on this machine.
    """

    inputs: tuple[Path, ...]
    out: Path
    against: tuple[Path, ...] = ()
    known: tuple[Path, ...] = ()
    threshold: float = 0.95
    seed: int = 1
    workers: int | None = None
    engine: str = "rensa"
    slurm: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an engine is given: sketches of ``pieces`` go into their files, the rest into ``folder``."""

    folder: Path
    pieces: Sequence[Piece]
    tests: Path
    bands: int
    options: Options
    progress: Callable[[str], None]
