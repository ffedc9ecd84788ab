"""What the command line asks for, and the folders that follow from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops.contract import environment, manifest
from opt_ops.contract.fence import Fence
from opt_ops.contract.manifest import CheckpointError
from opt_ops.contract.signals import Signals
from trainer import preconditions
from trainer.checkpoint import Destination, Retention
from trainer.recipes import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """What the command line asks for."""

    recipe_name: str
    recipe: Recipe
    run_dir: Path
    checkpoint_dir: Path
    attempt: str
    resume: Path | None
    from_scratch: bool
    init_from: Path | None
    lr_factors: Sequence[tuple[int, float]]
    skips: Sequence[tuple[int, int]]
    data: Sequence[str]
    data_since: Sequence[tuple[int, str]]
    valid: Sequence[str]
    tokenizer: Path | None
    fence: Path | None
    process_start: float
    signals: Signals
    snapshot_dir: Path | None = None
    checkpoint_copy: str = ""


def check_folders(job: TrainJob) -> None:
    """Create the folders of the attempt, if it may use them.

    Raises:
        UserError: the run folder holds the telemetry of another attempt. Or the checkpoint folder holds a checkpoint,
            and neither --resume nor --from-scratch was given.
    """
    may_hold = bool(job.resume) or job.from_scratch
    preconditions.require_own_folders(job.run_dir, job.checkpoint_dir, may_hold_checkpoints=may_hold)
    job.run_dir.mkdir(parents=True, exist_ok=True)
    job.checkpoint_dir.mkdir(parents=True, exist_ok=True)


def destination(job: TrainJob, fence: Fence) -> Destination:
    """Where the checkpoints of this rank go."""
    rule = job.recipe.checkpoint
    node = environment.node_name(os.environ)
    return Destination(
        folder=job.checkpoint_dir,
        node=node,
        disk=Path(str(job.snapshot_dir).replace("{node}", node)) if job.snapshot_dir else None,
        url=job.checkpoint_copy,
        fence=fence,
        snapshots=Retention(
            newest=rule.keep_snapshots, span_seconds=rule.span_minutes * 60, seconds=rule.snapshot_hours * 3600
        ),
        durable=Retention(newest=rule.keep),
    )


def initial_weights(job: TrainJob) -> str | None:
    """The identity of the weights that the run began with, if they were given: the digest in the marker.

    Raises:
        CheckpointError: there are none.
    """
    if job.init_from is None:
        return None
    try:
        return manifest.digest(job.init_from)
    except CheckpointError:
        if not job.resume:
            raise
        return None  # the weights come from the checkpoint to resume
