"""The training loop: from a recipe, and perhaps a checkpoint, to the last step."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_ops.contract import environment, manifest
from opt_ops.contract.fence import Fence
from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import CheckpointError, Manifest
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.phases import PhaseFile, PhaseName
from opt_ops.contract.signals import Signals
from trainer import device, preconditions
from trainer.checkpoint import Checkpointer, Destination, Retention, Writer
from trainer.checkpoint.schedule import SaveSchedules
from trainer.console import print_line
from trainer.data import dataset
from trainer.data.dataset import Dataset
from trainer.evaluation import Evaluation
from trainer.model.precision import DTYPES
from trainer.optim_config import stated
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.progress_log import ProgressLog, print_start
from trainer.recipes import Recipe, trajectory_digest
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import Steps
from trainer.telemetry import StepOverheads, Telemetry, write_config


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
    valid: Sequence[str]
    tokenizer: Path | None
    fence: Path | None
    process_start: float
    signals: Signals
    snapshot_dir: Path | None = None
    checkpoint_copy: str = ""


def train(job: TrainJob) -> None:
    """Train to the last step of the recipe.

    Raises:
        UserError: something that the user gave cannot work.
        RankEnvironmentError: some of the variables that a rank needs are missing.
        CheckpointError: the checkpoint to resume from is missing, torn or damaged.
        NotFiniteError: the loss or the gradient norm is not finite.
        LossScaleError: the loss scale of fp16 stays at its floor.
        CorruptionError, PeerCorruptionError: the data of this rank, or of another, is corrupt.
        SupersededError: a newer attempt of the lineage exists.
        RuntimeError: all steps are done, but the last checkpoint was not saved.
    """
    recipe = job.recipe
    place = environment.place_from_environment(os.environ)
    dp, tp = preconditions.check_layout(recipe, place.world)
    check_folders(job)
    heard = Options(run_dir=job.run_dir, attempt=job.attempt, fence=job.fence)
    outside = Outside(heard, place.rank, job.signals)
    phases = PhaseFile(job.run_dir / "phases.jsonl" if place.rank == 0 else None)
    phases.enter(PhaseName.START, None)
    device.prepare(job.run_dir, deterministic=recipe.deterministic)
    writer = Writer()  # forked before this process has threads, connections or a GPU
    data = dataset.load(
        job.data, job.valid, job.tokenizer, recipe, lambda: phases.enter(PhaseName.TOKENS, None, again=True)
    )
    phases.enter(PhaseName.START, None)
    settings_digest = trajectory_digest(recipe, job.lr_factors, job.skips, data.digest, _initial_weights(job))
    layout = mesh.start(place, dp, tp, recipe.parallel.replicas)
    mesh.require_agreement(
        "the recipe, its settings or the data", settings_digest + data.validation_digest, layout.host
    )
    AttemptRunner(job, data, build(recipe, layout), writer, phases, outside, settings_digest).run()
    dist.destroy_process_group()


class AttemptRunner:
    """Runs one attempt on one rank: holds its parts and the loop over steps.

    Args:
        job: what the command line asks for.
        data: what to train and to evaluate on.
        engine: with the initial weights.
        writer: of this rank's checkpoints.
        phases: where each phase is recorded.
        outside: what this rank hears.
        settings_digest: digest of everything that decides what is computed.

    Raises:
        UserError, CheckpointError: as :func:`train`.
    """

    def __init__(
        self,
        job: TrainJob,
        data: Dataset,
        engine: Engine,
        writer: Writer,
        phases: PhaseFile,
        outside: Outside,
        settings_digest: str,
    ) -> None:
        recipe, layout = job.recipe, engine.layout
        self._job, self._engine, self._layout, self._phases = job, engine, layout, phases
        self._settings_digest = settings_digest
        self._evaluation = Evaluation(recipe, data.validation, engine)
        self._guard = Guard(recipe)
        address = environment.address_of_rank_0(os.environ)
        self._checkpointer = Checkpointer(
            writer, _destination(job, outside.fence), engine.state(), address, layout.host
        )
        self._resumed = self._resume()
        self._progress = Progress()
        if found := self._resumed:
            self._progress = Progress(step=found.step, data_position=found.data_position, tokens=found.tokens)
        self._recorder = None
        if layout.rank == 0:
            config = _config(job, engine, data, self._progress)
            self._recorder = _recorder(job, layout, data, config)
            print_start(config, self._progress.step)
        self._log = ProgressLog(recipe)
        self._saves = SaveSchedules(recipe, snapshots=job.snapshot_dir is not None)
        layers = () if recipe.compiles(on_gpu=layout.device.type == "cuda") else engine.model.layers
        inputs = RankInputs(outside, layout, self._saves, layers)
        checksums = Checksums(engine.model, engine.optimizer, layout, recipe.checksum_every if engine.comparable else 0)
        samples = data.samples(recipe.data.seq_len, recipe.seed)
        self._steps = Steps(recipe, job.lr_factors, job.skips, engine, samples, self._guard, inputs, checksums)

    def run(self) -> None:
        """Run the steps that are left.

        Raises:
            Exception: as :func:`train`.
        """
        steps, found = self._job.recipe.steps, self._resumed
        if found and found.nodes and self._progress.step >= steps:
            # Nothing is left to train. But this last snapshot has no durable checkpoint yet.
            self._save(dict(found.telemetry), durable=True)
        overheads = StepOverheads()
        while self._progress.step < steps:
            overheads = self._next(overheads)
        self._phases.enter(PhaseName.ENDING, self._progress.step)
        if not self._checkpointer.finish():
            error = self._checkpointer.take_error()
            raise RuntimeError(f"all steps are done, but the last checkpoint was not saved: {error}")

    def _next(self, overheads: StepOverheads) -> StepOverheads:
        """Run one step, and save where a save is due.

        Args:
            overheads: seconds that were spent on saving and logging after the previous step. They count in this one.
        """
        recipe, recorder = self._job.recipe, self._recorder
        self._phases.enter(PhaseName.TRAINING, self._progress.step)
        device.collect_garbage(self._progress.step)
        step = self._progress.step + 1
        to_log = step % recipe.log_every == 0 or step == recipe.steps
        outcome = self._steps.take(self._progress, closely=to_log)
        self._progress = outcome.progress
        valid, overheads.evaluation = ({}, 0.0) if outcome.fault else self._evaluate(step)
        computed = time.monotonic()
        save_error = self._checkpointer.take_error()
        line: Mapping[str, Any] = {}
        if recorder:
            line = recorder.record(step, outcome, self._engine.optimizer, overheads, save_error, valid)
        if outcome.fault:
            self._phases.enter(PhaseName.ENDING, self._progress.step)
            self._checkpointer.wait()  # a save in flight holds an earlier, good state
            raise outcome.fault
        if recorder:
            self._log.update(line)
        overheads = StepOverheads(logging=time.monotonic() - computed)
        durable = outcome.agreed.save or outcome.measured.save_due
        if durable or outcome.measured.snapshot_due:
            overheads.saving = self._save(line, durable=durable)
        return overheads

    def _evaluate(self, step: int) -> tuple[dict[str, float], float]:
        """The losses on the corpora that are due after ``step``, and the seconds that this took."""
        due = self._evaluation.due(step)
        if not due:
            return {}, 0.0
        self._phases.enter(PhaseName.EVALUATION, step)
        return self._evaluation.run(due)

    def _resume(self) -> Manifest | None:
        """Read the weights or the state that training begins with. Returns what it resumes from, if anything."""
        job, checkpointer = self._job, self._checkpointer
        if not job.resume:
            if job.init_from:
                preconditions.require_same_shape(checkpointer.load_weights(job.init_from), job.recipe, job.init_from)
            return None
        found = checkpointer.load(job.resume)
        preconditions.require_same_shape(found, job.recipe, job.resume)
        if self._layout.rank == 0:
            print_line(f"resumed from {job.resume}, step {found.step}")
            if found.settings_digest != self._settings_digest:
                print_line(
                    "note: settings, data, learning-rate factors or skip windows differ from those of the checkpoint"
                )
        note = self._guard.restore(found.guard)
        if note and self._layout.rank == 0:
            print_line(note)
        return found

    def _save(self, line: Mapping[str, Any], *, durable: bool) -> float:
        """Start a save, and return the seconds that training was held up.

        Args:
            line: the telemetry line of the step, on rank 0.
            durable: whether a durable checkpoint is needed. Otherwise a snapshot is enough.
        """
        self._phases.enter(PhaseName.SAVING, self._progress.step)
        start = time.monotonic()
        self._checkpointer.wait()
        if durable:
            self._job.signals.save_requested.clear()  # this save answers all requests so far
        self._checkpointer.save(self._header(line), durable)
        cost = time.monotonic() - start
        self._saves.saved(cost, self._checkpointer.background_seconds, durable=durable)
        return cost

    def _header(self, line: Mapping[str, Any]) -> dict[str, Any]:
        job = self._job
        return {
            **asdict(self._progress),
            "guard": self._guard.state(),
            "attempt": job.attempt,
            "ts": time.time(),
            "layout": _layout(self._layout),
            "settings_digest": self._settings_digest,
            "seed": job.recipe.seed,  # with the step, this is the state of every random choice
            "schedule": stated(job.recipe.optim),
            "lr_factors": job.lr_factors,
            "skips": job.skips,
            "model": asdict(job.recipe.model),
            "telemetry": line,
        }


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


def _destination(job: TrainJob, fence: Fence) -> Destination:
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


def _initial_weights(job: TrainJob) -> str | None:
    """The identity of the weights that the run began with, if they were given: the digest in the marker."""
    if job.init_from is None:
        return None
    try:
        return manifest.digest(job.init_from)
    except CheckpointError:
        if not job.resume:
            raise
        return None  # the weights come from the checkpoint to resume


def _recorder(job: TrainJob, layout: Layout, data: Dataset, config: dict[str, Any]) -> Telemetry:
    write_config(job.run_dir, config)
    write_durably(job.run_dir / "tokenizer.json", data.tokenizer.text)
    return Telemetry(job.run_dir / "telemetry.jsonl", job.recipe, layout, job.process_start)


def _config(job: TrainJob, engine: Engine, data: Dataset, progress: Progress) -> dict[str, Any]:
    recipe = job.recipe
    config = recipe.optim
    return {
        "attempt": job.attempt,
        "recipe": job.recipe_name,
        "steps": recipe.steps,
        "settings": asdict(recipe),
        "schedule": stated(recipe.optim),
        "lr_factors": job.lr_factors,
        "skips": job.skips,
        "optimizer": {
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "clip_norm": config.clip_norm,
        },
        "layout": _layout(engine.layout),
        "kernels": dict(engine.model.ops.ran),
        "device": _device(recipe, engine.layout),
        "model": {"parameters": engine.size(), **asdict(recipe.model)},
        "data": data.about(),
        "resume": {"path": str(job.resume), "step": progress.step} if job.resume else None,
        "init_from": str(job.init_from) if job.init_from else None,
    }


def _device(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """What computes on rank 0, and which attention kernel it runs."""
    model = recipe.model
    heads, width = model.num_heads // layout.tp, model.hidden_size // model.num_heads
    query = torch.empty(1, recipe.data.seq_len, heads, width, dtype=DTYPES[recipe.precision], device=layout.device)
    return device.about(query.requires_grad_().transpose(1, 2), model.attention_dropout)


def _layout(layout: Layout) -> dict[str, int]:
    return {"world": layout.world, "dp": layout.dp, "tp": layout.tp}
