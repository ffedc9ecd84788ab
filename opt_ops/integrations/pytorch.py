"""A training loop in plain PyTorch under the supervisor. The loop keeps its shape; ``docs/adapters.md`` has an example.

Import this module before torch: with the import, the supervisor's options leave ``sys.argv``, and the process reacts to
the supervisor's signals.

Without ``--run-dir`` on the command line, the loop trains from the first update and saves to ``./checkpoints``.
"""

from opt_ops.integrations.this_process import OPTIONS, SIGNALS

# isort: split
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from opt_ops.contract import (
    Options,
    PhaseName,
    Place,
    RunFolder,
    UserError,
    committed,
    leaving_on_faults,
    place_from_environment,
    read,
    verify,
)
from opt_ops.contract.environment import MASTER_ADDR, MASTER_PORT, rendezvous_from_slurm
from opt_ops.contract.signals import Signals
from opt_ops.integrations.agreement import all_do, sum_over_ranks
from opt_ops.integrations.checkpoints import Written
from opt_ops.integrations.loop_settings import Schedule, plan_of, setting
from opt_ops.integrations.rank import SupervisedRank
from opt_ops.integrations.settings import refuse_unsupported
from opt_ops.integrations.torch_state import StateFiles, gradient_norm, load_random, state_files, write_random

__all__ = ["Run", "Step", "setting", "start_distributed", "supervised"]

_SPREAD = 1e-3
"""The relative spread of the gradient norm over ranks from which on their gradients differ. The norm of equal gradients
is equal; ranks with different samples differ by percents."""


class _DeafSignals:
    """Stands for the signals of a process that nobody supervises: they do what Python lets them do."""

    def __init__(self) -> None:
        self.save_requested = threading.Event()


def start_distributed() -> Place:
    """Start torch.distributed where there is more than one rank, unless that was done. ``supervised`` calls it, too.

    A script calls it itself if it needs the other ranks before, for example to shard a model.

    Returns:
        The place of this process.
    """
    place = place_from_environment(os.environ)
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    if place.world > 1 and not dist.is_initialized():
        if MASTER_ADDR not in os.environ:
            host, port = rendezvous_from_slurm(os.environ)
            os.environ |= {MASTER_ADDR: host, MASTER_PORT: str(port)}
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=place.rank, world_size=place.world)
    return place


_LEFT: list[dist.ProcessGroup | None] = []
"""Groups that were left, kept until the process ends. Otherwise DistributedDataParallel drops the last reference to one
while it holds the interpreter, and waits for gloo's threads. One of them may wait for the interpreter: for ever."""


@contextlib.contextmanager
def supervised(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Schedule,
    steps: int,
    batch: int,
    checkpoint_every: int = 0,
    tokens: int = 1,
    clip_norm: float = 0.0,
    keep: int = 0,
    state: Mapping[str, Any] | None = None,
) -> Iterator["Run"]:
    """Put a training loop under the supervisor. The block holds ``for step in run.steps(): …``.

    On entry, the checkpoint of ``--resume`` is loaded into ``model`` and ``optimizer``. An error inside ends the
    process with the exit code that tells the supervisor what happened.

    Args:
        model: moved to its device. Wrap it in ``DistributedDataParallel`` inside the block, or shard it before.
        optimizer: of the parameters of ``model``. Its groups may have different learning rates: they keep their ratio.
        schedule: of the largest learning rate: ``kind`` and fields as in ``config.json``, see ``docs/formats.md``. Or a
            function that returns the learning rate of an update, by its number from 1.
        steps: the last update.
        batch: samples of an update, over all ranks.
        checkpoint_every: updates between saves; 0: the last update only, and whenever the supervisor asks.
        tokens: of a sample.
        clip_norm: the norm that gradients are clipped to; 0: they are not clipped.
        keep: checkpoints to keep, pinned ones not counted; 0: all.
        state: what to save, as ``torch.distributed.checkpoint.save`` takes it. Needed only where that is more than the
            model and the optimizer. A sharded model is saved in shards without it, too.

    ``--set`` changes ``steps``, ``checkpoint_every``, ``optim.peak_lr``, ``optim.warmup_steps``, ``optim.total_steps``,
    ``optim.final_fraction``, ``optim.betas``, ``optim.weight_decay`` and ``optim.clip_norm``. The script reads
    settings of its own by :func:`setting`.
    """
    with leaving_on_faults() if OPTIONS.supervised else contextlib.nullcontext():
        options = OPTIONS if OPTIONS.supervised else _options_of_nobody()
        refuse_unsupported(options, ("init_from",))
        ours = not dist.is_initialized()
        world = place_from_environment(os.environ).world
        if batch % world:  # before the ranks meet: one that is late would find that the others have left
            raise UserError(f"batch={batch} cannot be divided among {world} ranks: choose a multiple of {world}.")
        start_distributed()
        plan, base = plan_of(
            options,
            optimizer,
            schedule=schedule,
            steps=steps,
            checkpoint_every=checkpoint_every,
            clip_norm=clip_norm,
            batch=batch,
            tokens=tokens,
            keep=keep,
        )
        # A folder of another rank than 0 writes nothing.
        folder = None if OPTIONS.supervised else RunFolder(replace(options, run_dir=Path()), rank=1)
        rank = SupervisedRank(options, SIGNALS or cast(Signals, _DeafSignals()), folder)
        files = state_files(model, optimizer, state, rank.rank)
        rank.start(plan, optimizer)
        run = Run(rank, model, optimizer, files, steps=plan.steps, batch=batch, clip_norm=plan.clip_norm, base=base)
        run.load(options)
        yield run
        run.end()
        if ours and dist.is_initialized():
            _LEFT.append(dist.group.WORLD)
            dist.destroy_process_group()


def _options_of_nobody() -> Options:
    folder = Path("checkpoints")
    if found := committed(folder):
        raise UserError(
            f"{folder}/ holds step {found[-1][0]} of an earlier run, and a run that nobody supervises begins with the "
            f"first update: move the folder away. `opt-ops run start` resumes."
        )
    if place_from_environment(os.environ).rank == 0:
        print(f"nobody supervises this run: it begins with the first update, and saves to {folder}/", flush=True)
    return replace(OPTIONS, run_dir=None, checkpoint_dir=folder, attempt="unsupervised", from_scratch=True)


class Run:
    """A run of updates. :func:`supervised` makes it.

    Attributes:
        rank, world: the number of this process, and how many there are.
    """

    def __init__(
        self,
        rank: SupervisedRank,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        files: StateFiles,
        *,
        steps: int,
        batch: int,
        clip_norm: float,
        base: Callable[[int], float] | None,
    ) -> None:
        self.rank, self.world = rank.rank, rank.world
        self._supervised, self._model, self._optimizer, self._files = rank, model, optimizer, files
        self._steps, self._batch, self._clip_norm, self._base = steps, batch, clip_norm, base
        self._resume: Path | None = None
        self._save_is_due = False
        self._norms_compared = rank.world == 1

    def load(self, options: Options) -> None:
        """Load the checkpoint to continue from, or the weights to begin with."""
        rank = self._supervised
        if rank.resumed and options.resume:
            self._resume = options.resume
            self._files.load(options.resume)
        elif path := options.init_from:
            all_do(lambda: verify(path) if self.rank == 0 else read(path), self.world, path)
            self._files.load_weights(path)

    def steps(self) -> Iterator["Step"]:
        """The updates from the one after the checkpoint to the last. A save that is due follows the body of the loop.

        Random numbers continue where the checkpoint left them.

        Raises:
            UserError: the body of the loop has not called :meth:`Step.update`.
        """
        rank = self._supervised
        if self._resume and not load_random(self._resume, self.rank) and self.rank == 0:
            print(f"{self._resume} has no random numbers for {self.world} ranks: they begin anew", flush=True)
        self._optimizer.zero_grad(set_to_none=True)
        while rank.step < self._steps:
            poisoned = rank.begin_update()
            first = rank.next_sample()
            share = self._batch // self.world
            samples = range(first + self.rank * share, first + (self.rank + 1) * share)
            step = Step(self, rank.step + 1, first, samples, poisoned)
            yield step
            if not step.updated:
                raise UserError(f"the loop went on from update {step.number} without step.update().")
            self._save_if_due()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Tells the supervisor that the block evaluates, so that it does not take this for a hang."""
        rank = self._supervised
        rank.folder.phase(PhaseName.EVALUATION, rank.step)
        began = time.monotonic()
        yield
        rank.leave_out_seconds(time.monotonic() - began)
        rank.folder.phase(PhaseName.TRAINING, rank.step)

    def update(self, step: "Step") -> None:
        """Apply an update: see :meth:`Step.update`."""
        rank = self._supervised
        norm = gradient_norm(self._model, self._optimizer, self._clip_norm)
        self._require_equal_gradients(norm)
        base_lr = None if self._base is None else float(self._base(step.number))
        step.loss = rank.before_update(step.loss, norm, base_lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._save_is_due = rank.after_update()

    def end(self) -> None:
        """Save what is still to be saved.

        Raises:
            UserError: the loop was left before its end.
        """
        self._save_if_due()
        step = self._supervised.step
        if step < self._steps:
            raise UserError(
                f"the loop was left after update {step}, before the last one, {self._steps}. The supervisor would take "
                "the run for unfinished: stop it by `opt-ops run stop` instead."
            )
        self._supervised.folder.phase(PhaseName.ENDING, step)

    def _save_if_due(self) -> None:
        if self._save_is_due:
            self._save_is_due = False
            self._supervised.save(self._write)

    def _write(self, path: Path) -> Written:
        written = self._files.write(path, weights_moved=self._supervised.weights_moved)
        return Written(written.names | {write_random(path, self.rank)}, written.state)

    def _require_equal_gradients(self, norm: float) -> None:
        """In the first update: a script that forgot to wrap its model would train a model of its own on each rank."""
        if self._norms_compared:
            return
        self._norms_compared = True
        total, squares = sum_over_ranks([norm, norm * norm], self.world)
        mean = total / self.world
        if math.isfinite(squares) and squares / self.world - mean * mean > (_SPREAD * mean) ** 2:
            raise UserError(
                "the gradients differ between ranks: wrap the model in DistributedDataParallel, after `supervised`, "
                "or shard it before."
            )


class Step:
    """One update.

    Attributes:
        number: of the update; 1 is the first.
        sample: the first sample of its batch, from 0, in an order of data without end.
        samples: the samples of this rank.
        loss: the sum of what :meth:`backward` got; after :meth:`update` its mean over ranks.
        updated: whether :meth:`update` was called.
    """

    def __init__(self, run: Run, number: int, sample: int, samples: range, poisoned: bool) -> None:
        self.number, self.sample, self.samples = number, sample, samples
        self.loss = 0.0
        self.updated = False
        self._run, self._poisoned = run, poisoned
        self._total: torch.Tensor | None = None

    def data_index(self, n: int, seed: int = 0) -> torch.Tensor:
        """An index below ``n`` for each sample of this rank, as ``torch.randint`` would draw them.

        Each depends on the number of the sample and on ``seed`` only. So a resume, on any number of ranks, continues
        with the same data.
        """
        return torch.tensor([_scattered(sample, seed) % n for sample in self.samples], dtype=torch.int64)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss.backward()``. To accumulate gradients over k parts of a batch, call it k times with ``loss / k``."""
        if self._poisoned:
            loss = loss * math.nan
        self._total = loss.detach() if self._total is None else self._total + loss.detach()
        loss.backward()

    def update(self) -> None:
        """Clip the gradients, set the learning rate, update the weights, and write the line of telemetry.

        If the loss or the gradient norm is not finite on any rank, all ranks leave before the weights change.

        Raises:
            UserError: there was no :meth:`backward`, or it is the second time.
        """
        if self._total is None or self.updated:
            what = "twice" if self.updated else "before step.backward(loss)"
            raise UserError(f"step.update() was called {what} in update {self.number}.")
        self.updated = True
        self.loss = float(self._total)
        self._run.update(self)


def _scattered(number: int, seed: int) -> int:
    """A pseudo-random whole number below 2^64 (the finalizer of SplitMix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    value = (number + 1 + (seed << 40)) * 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
