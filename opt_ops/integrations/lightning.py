"""Puts a Lightning ``Trainer`` under the supervisor, by one line.

Import this module before Lightning: it installs the handlers of signals, and takes the supervisor's options off the
command line, so that the script's own parser does not meet them. Then::

    trainer = Trainer(**placement(), max_steps=5000)
    supervise(trainer, checkpoint_every=500)
    trainer.fit(model)

Without ``--run-dir``, nothing changes. Under supervision, training is one stream of updates: Lightning sees one epoch.
"""

# isort: split  the handlers of signals come first: the imports below take many seconds
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
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from opt_ops.contract import PhaseName, UserError, place_from_environment
from opt_ops.integrations.checkpoints import Written
from opt_ops.integrations.lightning_data import MicroBatches, with_batches
from opt_ops.integrations.loop_settings import plan_of, setting
from opt_ops.integrations.rank import SupervisedRank, leaving_on_faults
from opt_ops.integrations.settings import refuse_unsupported
from opt_ops.integrations.this_process import OPTIONS, SIGNALS
from opt_ops.integrations.torch_state import gradient_norm, load_random, write_random

__all__ = ["OptOpsCallback", "placement", "setting", "supervise"]

_PARTS = {"state_dict": "model.pt", "optimizer_states": "optimizer.pt"}
_REST = "lightning.pt"


def placement() -> dict[str, int]:
    """``devices`` and ``num_nodes`` for the ``Trainer``, as the supervisor has started the ranks. Alone, one device."""
    place = place_from_environment(os.environ)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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
        self._poisoned = self._agreed = self._stepped = False
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
        trainer.strategy.checkpoint_io = _Files(self)
        trainer._default_root_dir = str(OPTIONS.run_dir)
        trainer._accelerator_connector.use_distributed_sampler = False
        fit = trainer.fit

        def supervised_fit(*given: Any, **named: Any) -> None:
            with leaving_on_faults():
                named["ckpt_path"] = str(OPTIONS.resume) if OPTIONS.resume else None
                fit(*given[:4], **named)

        trainer.fit = supervised_fit

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
        world = place_from_environment(os.environ).world
        if trainer.world_size != world:
            raise UserError(
                f"Lightning would train on {trainer.world_size} ranks, and the supervisor has started {world}: "
                "make the Trainer with **placement()."
            )
        for name, value in (("limit_train_batches", 1.0), ("overfit_batches", 0.0), ("fast_dev_run", False)):
            if getattr(trainer, name) not in (value, None):
                raise UserError(f"Trainer({name}={getattr(trainer, name)}) is not supported under supervision.")

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read the checkpoint to continue from, and put our order of data under the script's loader."""
        with leaving_on_faults():
            if not pl_module.automatic_optimization:
                raise UserError("manual optimization is not supported under supervision: use automatic optimization.")
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
        batches.begin(steps, OPTIONS.skips, lambda: (rank.step, rank.position))
        trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = steps, -1
        self._keep_intervals(trainer)
        return with_batches(original, batches)

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
                raise UserError(f"the model has {len(trainer.optimizers)} optimizers: under supervision it needs one.")
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals back from Lightning, and continue with the random numbers of the checkpoint."""
        with leaving_on_faults():
            self._rank.outside.signals.install()
            if OPTIONS.resume:
                load_random(OPTIONS.resume, self._rank.rank)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin an update with its first micro-batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            with leaving_on_faults():
                self._loss = None
                self._agreed = self._stepped = False
                self._poisoned = self._rank.begin_update()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Add the micro-batch's part to the loss of the update. Lightning has divided it by their number."""
        if self._poisoned:
            loss.register_hook(lambda gradient: gradient * math.nan)
        part = loss.detach() * math.nan if self._poisoned else loss.detach()
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
            if self._rank.after_update(skipped=not self._stepped):
                self._rank.save(self._write)

    def _write(self, path: Path) -> Written:
        self._trainer.save_checkpoint(path)
        names = {write_random(path, self._rank.rank)}
        if self._rank.rank != 0:
            return Written(frozenset(names))
        state = _PARTS.values() if self._rank.weights_moved else ()
        return Written(frozenset(names | {_REST, *_PARTS.values()}), frozenset(state))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell the supervisor, so that it does not take an evaluation for a hang."""
        self._evaluation_began = time.monotonic()
        self._rank.folder.phase(PhaseName.EVALUATION, self._rank.step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell that it is over."""
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

    def progress(self, loops: dict[str, Any]) -> None:
        """Let Lightning's counters of micro-batches say what this number of ranks would have needed."""
        done = self._rank.step * self._trainer.accumulate_grad_batches
        counters = loops["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            counters[part] |= {"ready": done, "started": done, "processed": done, "completed": done - 1}


class _Files(CheckpointIO):
    """Three files instead of one: what every update changes lies apart, so that a stale save can be found."""

    def __init__(self, callback: OptOpsCallback) -> None:
        self._callback = callback

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` into the folder ``path``."""
        rest = {name: value for name, value in checkpoint.items() if name not in _PARTS}
        parts = {file: checkpoint.get(name) for name, file in _PARTS.items()}
        for name, value in {**parts, _REST: rest}.items():
            with (Path(path) / name).open("wb") as file:
                torch.save(value, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the folder ``path``.

        Raises:
            UserError: the checkpoint is not of this adapter.
        """
        where = map_location or (lambda storage, _: storage)
        try:
            whole = torch.load(Path(path) / _REST, where, weights_only=weights_only is not False)
            for name, file in _PARTS.items():
                whole[name] = torch.load(Path(path) / file, where, weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"{path} was saved by another trainer: it has no {Path(error.filename).name}.") from None
        self._callback.progress(whole["loops"])
        return whole

    def remove_checkpoint(self, path: Any) -> None:
        """Nothing: the supervisor's rules decide what is kept."""
