"""Puts a Lightning ``Trainer`` under the supervisor, by one line.

Import this module before Lightning: it installs the handlers of signals, and takes the supervisor's options off the
command line, so that the script's own parser does not meet them. Then::

    trainer = Trainer(**placement(), max_steps=5000)
    supervise(trainer, checkpoint_every=500)
    trainer.fit(model)

Without ``--run-dir``, nothing changes. Under supervision, training is one stream of updates: Lightning sees one epoch.
"""

from opt_ops.integrations.this_process import OPTIONS, SIGNALS

# isort: split
# The handlers of signals come first: the imports below take many seconds.
import math
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from opt_ops.contract import PhaseName, UserError, leaving_on_faults, place_from_environment
from opt_ops.integrations.checkpoints import Written
from opt_ops.integrations.lightning_data import MicroBatches, with_batches
from opt_ops.integrations.lightning_files import Files, require_readable, write_parts
from opt_ops.integrations.loop_settings import plan_of, setting
from opt_ops.integrations.rank import SupervisedRank
from opt_ops.integrations.settings import refuse_unsupported
from opt_ops.integrations.torch_state import gradient_norm, load_random, write_random

__all__ = ["OptOpsCallback", "placement", "setting", "supervise"]

_BY_EPOCH = (BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder, StochasticWeightAveraging)
"""Callbacks that change batches, rates or weights behind the supervisor's back, by epochs that are not seen here."""


def placement() -> dict[str, int]:
    """``devices`` and ``num_nodes`` for the ``Trainer``, as the supervisor has started the ranks. Alone, one device."""
    place = place_from_environment(os.environ)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world))  # whoever starts ranks without it has one node
    return {"devices": here, "num_nodes": max(1, place.world // here)}


def supervise(
    trainer: pl.Trainer,
    *,
    schedule: Mapping[str, Any] | None = None,
    checkpoint_every: int = 0,
    keep: int = 0,
    tokens: int = 1,
) -> None:
    """Let the supervisor watch and steer ``trainer``. Call it before ``trainer.fit(model)``.

    If something cannot work, or if ``fit`` is left by an error, the process ends with the exit code of the contract.

    Args:
        trainer: with ``max_steps`` or ``max_epochs``.
        schedule: kind and fields as in ``config.json``. It is used instead of the model's scheduler, and the supervisor
            computes it a second time. Without it the model's scheduler is used, and only what the supervisor multiplies
            its rates by can be proven.
        checkpoint_every: updates between saves; 0: the last update only, and whenever the supervisor asks.
        keep: checkpoints to keep, pinned ones not counted; 0: all.
        tokens: of a sample.
    """
    if not OPTIONS.supervised:
        return
    callback = OptOpsCallback(schedule=schedule, checkpoint_every=checkpoint_every, keep=keep, tokens=tokens)
    with leaving_on_faults():
        callback.attach(trainer)


class OptOpsCallback(Callback):
    """What :func:`supervise` adds to the trainer."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._loss: torch.Tensor | None = None
        self._poisoned = self._agreed = self._stepped = self._save_is_due = False
        self._random_is_due = OPTIONS.resume is not None
        self._readable = False
        self._rates: list[Any] = []

    def attach(self, trainer: Any) -> None:
        """Take the trainer's data, saves and updates into supervision.

        Raises:
            UserError: an option or an argument of the trainer cannot work.
        """
        refuse_unsupported(OPTIONS)
        self._require(trainer)
        self._trainer = trainer
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Checkpoint)] + [self]
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end is None:
                callback._check_on_train_epoch_end = False  # at an epoch's end there may have been no evaluation yet
        trainer.strategy.checkpoint_io = Files(trainer.strategy.checkpoint_io, OPTIONS.resume, self._set_progress)
        trainer._default_root_dir = str(OPTIONS.run_dir)
        data, needs_sampler = trainer._data_connector, trainer._data_connector._requires_distributed_sampler
        data._requires_distributed_sampler = lambda loader: (
            not isinstance(loader.batch_sampler, MicroBatches) and needs_sampler(loader)
        )
        fit, loop, end_of_batch = trainer.fit, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.on_advance_end

        def supervised_fit(
            model: Any,
            train: Any = None,
            val: Any = None,
            datamodule: Any = None,
            ckpt_path: Any = None,
            **o: Any,
        ) -> None:
            with leaving_on_faults():
                if ckpt_path not in (None, "last", "hpc"):
                    raise UserError(
                        f"fit(ckpt_path={str(ckpt_path)!r}) is not supported under supervision: the supervisor says "
                        "what to continue from. Load weights to begin with into the model instead."
                    )
                train, val = o.pop("train_dataloaders", train), o.pop("val_dataloaders", val)
                self._readable = o.get("weights_only") is False
                if not model.automatic_optimization:
                    raise UserError("manual optimization is not supported under supervision.")
                try:
                    fit(model, train, val, datamodule, str(OPTIONS.resume) if OPTIONS.resume else None, **o)
                except (MisconfigurationException, RuntimeError) as error:
                    if isinstance(error, MisconfigurationException) or "multiple optimizers" in str(error):
                        raise UserError(str(error)) from error
                    raise

        def end_of_supervised_batch(fetcher: Any) -> None:
            end_of_batch(fetcher)  # a validation, and a scheduler that waits for its result
            if self._save_is_due:
                with leaving_on_faults():
                    self._save_is_due = False
                    self._rank.save(self._write)

        trainer.fit, loop.on_advance_end = supervised_fit, end_of_supervised_batch

    def _require(self, trainer: Any) -> None:
        """Refuse what breaks a promise to the supervisor."""
        connector = trainer._accelerator_connector
        if isinstance(connector.cluster_environment, SLURMEnvironment):
            raise UserError(
                "Lightning takes its ranks from Slurm, and would requeue the job when the supervisor asks for a save: "
                "set TORCHELASTIC_RUN_ID before the Trainer is made, as the node agent does."
            )
        if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise UserError(
                f"the strategy {type(trainer.strategy).__name__} is not supported under supervision: use ddp."
            )
        place = place_from_environment(os.environ)
        if (trainer.global_rank, trainer.world_size) != (place.rank, place.world):
            raise UserError(
                f"Lightning takes this for rank {trainer.global_rank} of {trainer.world_size}, and the supervisor has "
                f"started rank {place.rank} of {place.world}: make the Trainer with **placement()."
            )
        if callback := next((each for each in trainer.callbacks if isinstance(each, _BY_EPOCH)), None):
            raise UserError(f"the callback {type(callback).__name__} is not supported under supervision.")
        for name, value in (("limit_train_batches", 1.0), ("overfit_batches", 0.0), ("fast_dev_run", False)):
            if getattr(trainer, name) not in (value, None):
                raise UserError(f"Trainer({name}={getattr(trainer, name)}) is not supported under supervision.")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read the checkpoint to continue from, and put our order of data under the script's loader."""
        if stage != "fit":
            return
        with leaving_on_faults():
            assert SIGNALS is not None
            self._rank = SupervisedRank(OPTIONS, SIGNALS)
            source = trainer.fit_loop._data_source
            original = source.dataloader
            made: list[Any] = []

            def loader() -> Any:
                if not made:
                    made.append(self._loader(trainer, original()))
                return made[0]

            source.dataloader = loader

    def _loader(self, trainer: Any, original: Any) -> Any:
        seed, rank = int(os.environ.get("PL_GLOBAL_SEED", "0")), self._rank
        accumulate, before = trainer.accumulate_grad_batches, rank.resumed
        batches = MicroBatches(original, seed=seed, rank=rank.rank, world=rank.world, accumulate=accumulate)
        kept = int(before.telemetry.get("bsz", batches.batch)) if before else batches.batch
        if kept != batches.batch and before and before.layout.get("world") != rank.world:
            micro = batches.batch // accumulate  # on another number of ranks, an update keeps its samples
            if kept % micro:
                raise UserError(
                    f"{OPTIONS.resume} was trained with {kept} samples an update, and {rank.world} ranks take {micro} "
                    f"at a time: choose a batch_size so that {kept} is a multiple of that."
                )
            trainer.accumulate_grad_batches = kept // micro
            batches = MicroBatches(original, seed=seed, rank=rank.rank, world=rank.world, accumulate=kept // micro)
        self._batches = batches
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        steps = trainer.max_steps if trainer.max_steps > 0 else epochs * batches.updates_per_epoch
        steps = int(OPTIONS.settings["steps"]) if OPTIONS.settings.get("steps", "").isdecimal() else steps
        if steps <= 0:
            raise UserError("the Trainer has neither max_steps nor max_epochs: under supervision it needs a last step.")
        self._steps = steps
        batches.begin(steps, OPTIONS.skips, self._before_first_batch if original.num_workers == 0 else self._trained)
        trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = steps, -1
        self._keep_intervals(trainer)
        return with_batches(original, batches)

    def _trained(self) -> tuple[int, int]:
        return self._rank.step, self._rank.position

    def _before_first_batch(self) -> tuple[int, int]:
        """Samples that are read in this process may draw random numbers: those of the checkpoint come before them."""
        self._restore_random()
        return self._trained()

    def _restore_random(self) -> None:
        if self._random_is_due and OPTIONS.resume:
            self._random_is_due = False
            load_random(OPTIONS.resume, self._rank.rank)

    def _keep_intervals(self, trainer: Any) -> None:
        """What the script counts in epochs is counted in batches of the one stream."""
        of_epoch = self._batches.updates_per_epoch * trainer.accumulate_grad_batches
        if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is not None:
            every = trainer.val_check_interval * trainer.check_val_every_n_epoch
            trainer.val_check_interval = max(1, int(of_epoch * every))
            trainer.check_val_every_n_epoch = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Write config.json, when there is an optimizer, and no state has been loaded into it yet."""
        with leaving_on_faults():
            trainer.fit_loop._data_source.dataloader()
            if len(trainer.optimizers) != 1:
                raise UserError("the model has no optimizer: under supervision it needs one.")
            if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
                raise UserError("LBFGS computes gradients several times an update: it is not supported.")
            if trainer.gradient_clip_algorithm not in (None, "norm"):
                raise UserError("gradients can be clipped by their norm only, under supervision.")
            self._optimizer = trainer.optimizers[0]
            self._optimizer.register_step_post_hook(self._after_step)
            of_epoch = self._batches.updates_per_epoch * trainer.accumulate_grad_batches
            for config in trainer.lr_scheduler_configs:
                if config.interval == "epoch":
                    config.interval, config.frequency = "step", config.frequency * of_epoch
            given = dict(self._arguments)
            schedule = given.pop("schedule") or (lambda _: 0.0)
            plan, self._base = plan_of(
                OPTIONS,
                self._optimizer,
                schedule=schedule,
                steps=self._steps,
                clip_norm=float(trainer.gradient_clip_val or 0.0),
                batch=self._batches.batch,
                about={"framework": f"lightning {version('lightning')}"},
                **given,
            )
            trainer.gradient_clip_val = None  # the norm is needed before, so we clip ourselves
            self._clip_norm = plan.clip_norm
            self._rank.start(plan, self._optimizer)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals back from Lightning: its handler of SIGTERM would end the training."""
        self._rank.outside.signals.install()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals back from Lightning."""
        self._rank.outside.signals.install()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin an update with its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            with leaving_on_faults():
                self._restore_random()
                self._loss = None
                self._agreed = self._stepped = False
                self._poisoned = self._rank.begin_update()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Add the micro-batch's part to the loss of the update. Lightning has divided it by their number."""
        if self._poisoned:
            loss.register_hook(lambda gradient: gradient * math.nan)
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of fp16; Lightning has multiplied by its scale
        part = loss.detach() if scaler is None else loss.detach() / scaler.get_scale()
        part = part * math.nan if self._poisoned else part
        self._loss = part if self._loss is None else self._loss + part

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Agree on the update; set what it uses, whatever a scheduler or a checkpoint has left, and read it back."""
        with leaving_on_faults():
            groups = self._optimizer.param_groups
            self._rates = [
                group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"] for group in groups
            ]
            loss = float(self._loss) if self._loss is not None else math.nan
            gnorm: float | None = gradient_norm(pl_module, self._optimizer, self._clip_norm)
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if scaled and gnorm is not None and not math.isfinite(gnorm) and math.isfinite(loss):
                gnorm = None  # the scaler of fp16 skips this update and lowers the scale; that is no fault
            self._rank.before_update(loss, gnorm, None if self._base is None else max(map(float, self._rates)))
            self._agreed = True

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        """Give the scheduler its own rates back: some compute the next rate from the last one."""
        self._stepped = True
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the line of the update, and save where that is due."""
        if not self._agreed:
            return
        with leaving_on_faults():
            self._agreed = False
            if not self._stepped:
                self._after_step(self._optimizer)
                self._stepped = False
            self._save_is_due = self._rank.after_update(skipped=not self._stepped)

    def _write(self, path: Path) -> Written:
        # Not Trainer.save_checkpoint: it ends in a barrier, and a rank that could not write would not come to it.
        checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        names = frozenset({write_random(path, self._rank.rank)})
        if self._rank.rank != 0:
            return Written(names)
        written, state = write_parts(checkpoint, path)
        if not self._readable:
            require_readable(path)
            self._readable = True
        return Written(names | written, state if self._rank.weights_moved else frozenset())

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the supervisor, so that it does not take an evaluation for a hang."""
        if trainer.state.fn != "fit":
            return
        self._evaluation_began = time.monotonic()
        self._rank.folder.phase(PhaseName.EVALUATION, self._rank.step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell that it is over."""
        if trainer.state.fn != "fit":
            return
        self._rank.leave_out_seconds(time.monotonic() - self._evaluation_began)
        self._rank.folder.phase(PhaseName.TRAINING, self._rank.step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Refuse an end before the last update."""
        with leaving_on_faults():
            step = self._rank.step
            if step < self._steps:
                raise UserError(
                    f"training was stopped after update {step} of {self._steps}: no callback may end it early under "
                    "supervision."
                )
            self._rank.folder.phase(PhaseName.ENDING, step)

    def _set_progress(self, loops: dict[str, Any]) -> None:
        """Let Lightning's counters of micro-batches say what this number of ranks would have needed."""
        step = self._rank.step
        done = step * self._trainer.accumulate_grad_batches
        counters = loops["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            counters[part] |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
        counters["is_last_batch"] = False  # there may be more steps now
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1  # Lightning adds the last one
