"""What a supervised rank does around every update, whatever framework trains.

The order of an update:

1. :meth:`SupervisedRank.begin_update`, before the forward pass: reads the drills.
2. Forward and backward pass of all micro-batches. If ``begin_update`` said so, the loss is NaN, for a drill.
3. :meth:`SupervisedRank.before_update`, when gradients are complete and clipped: the one reduction. It raises if there
   must be no update. It sets the learning rate, and reads the optimizer back.
4. The update.
5. :meth:`SupervisedRank.after_update`: the line of telemetry. It says whether to save.
6. :meth:`SupervisedRank.save`, where that is so.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opt_ops.contract import (
    Agreed,
    Manifest,
    NotFiniteError,
    Options,
    Outside,
    PhaseName,
    RunFolder,
    SupersededError,
    lr_of,
    next_sample,
    place_from_environment,
    starting_point,
)
from opt_ops.contract.learning_rate import total_lr_factor
from opt_ops.contract.signals import Signals
from opt_ops.integrations.agreement import all_do, sum_over_ranks
from opt_ops.integrations.checkpoints import Checkpoints, Written
from opt_ops.integrations.optimizer import LiveOptimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is trained.

    Attributes:
        steps: the last update.
        schedule: as ``config.json`` has it. Of an unknown kind, every update gives its ``base_lr``.
        betas: of the optimizer; empty where it has none.
        weight_decay: of the groups that have any.
        clip_norm: the norm that gradients are clipped to; 0: they are not clipped.
        batch: samples of an update, over all ranks.
        tokens: of a sample, for ``tokens`` and ``wps``.
        checkpoint_every: updates between saves; 0: only the last one and those that are asked for.
        keep: checkpoints to keep; 0: all.
        about: more fields of ``config.json``.
    """

    steps: int
    schedule: Mapping[str, Any]
    betas: tuple[float, ...]
    weight_decay: float
    clip_norm: float
    batch: int
    tokens: int = 1
    checkpoint_every: int = 0
    keep: int = 0
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


class SupervisedRank:
    """One rank of a supervised attempt. Make it when torch.distributed has been started: then, if the checkpoint is
    refused, all ranks leave with the exit code that says so. Otherwise only rank 0 does, and the others wait for it.

    Args:
        options: of this process, with a ``run_dir``.
        signals: made when the process began.
        folder: what stands for the run folder where nobody supervises.

    Attributes:
        step: the last update that was applied.
        position: of the data, as ``data_position`` in telemetry.
        tokens: trained so far.
        resumed: the manifest of the checkpoint to continue from; None at step 0.
        weights_moved: whether an update with a learning rate above 0 was applied since the last save. If none was, the
            weights are those of the save before, and that is no stale save: leave their files out of ``Written.state``.

    Raises:
        CheckpointError: the checkpoint to continue from is missing, torn, damaged or stale.
        UserError: the folders are not those of a new attempt.
    """

    def __init__(self, options: Options, signals: Signals, folder: RunFolder | None = None) -> None:
        place = place_from_environment(os.environ)
        self.options, self.rank, self.world = options, place.rank, place.world
        self.outside = Outside(options, self.rank, signals)
        self.resumed: Manifest | None
        self.folder: RunFolder
        self.resumed, self.folder = all_do(
            lambda: (starting_point(options, self.rank), folder or RunFolder(options, self.rank)),
            self.world if dist.is_available() and dist.is_initialized() else 1,
            options.resume or options.checkpoint_dir,
        )
        self.step = self.resumed.step if self.resumed else 0
        self.position = self.resumed.data_position if self.resumed else 0
        self.tokens = self.resumed.tokens if self.resumed else 0
        self.skipped = int(self.resumed.telemetry.get("skipped", 0)) if self.resumed else 0
        self.weights_moved = False
        self._local: list[float] = []
        self._agreed = Agreed()
        self._line: dict[str, Any] = {}
        self._save_seconds = 0.0
        self._save_error: str | None = None

    def start(self, plan: Plan, optimizer: torch.optim.Optimizer) -> None:
        """Write ``config.json``. Call it before the state of a checkpoint is loaded into the optimizer."""
        self._plan = plan
        self._live = LiveOptimizer(optimizer, plan.betas, plan.weight_decay)
        self._checkpoints = Checkpoints(self.options, self.outside, self.rank, self.world, plan.keep)
        optimizer_settings = {"betas": plan.betas, "weight_decay": plan.weight_decay, "clip_norm": plan.clip_norm}
        resume = {"path": str(self.options.resume), "step": self.step} if self.options.resume else None
        self.folder.config(
            steps=plan.steps,
            schedule=plan.schedule,
            optimizer=optimizer_settings,
            layout={"world": self.world},
            resume=resume,
            versions={"python": sys.version.split()[0], "torch": torch.__version__},
            **plan.about,
        )
        self._since = time.monotonic()

    def next_sample(self) -> int:
        """The first sample of the next update, in the original order, from 0."""
        return next_sample(self.position, self._plan.batch, self.options.skips)

    def begin_update(self) -> bool:
        """Begin the next update. Returns whether its loss must become NaN on this rank, for a drill."""
        self.folder.phase(PhaseName.TRAINING, self.step)
        self._local = self.outside.local(self.step + 1)
        return bool(self._local[3])

    def before_update(self, loss: float, gnorm: float | None, base_lr: float | None = None) -> float:
        """Agree with all ranks that the update is applied, and set the optimizer for it.

        Args:
            loss: of this rank's part of the batch; the mean over ranks is what telemetry has.
            gnorm: of all gradients, before clipping, the same on all ranks; None where it is not known.
            base_lr: the rate that the schedule alone gives, for a schedule of an unknown kind.

        Returns:
            The mean loss over ranks.

        Raises:
            SupersededError: a newer attempt exists.
            NotFiniteError: the loss or the gradient norm is not finite, on all ranks.
            UserError: ``drill.json`` cannot be read.
        """
        plan, step = self._plan, self.step + 1
        mean, *sums = sum_over_ranks([loss / self.world, *self._local], self.world)
        self._agreed = self.outside.agreed(sums)
        if self._agreed.superseded:
            raise SupersededError("superseded: a newer attempt exists; nothing was saved")
        factors = self.options.lr_factors
        lr = lr_of(plan.schedule, factors, step)
        if lr is None:
            assert base_lr is not None, "a schedule of an unknown kind needs the rate of each update"
            lr = base_lr * total_lr_factor(step, factors)
        self._live.set(lr * self._agreed.lr_factor)
        self._line = {
            "num_updates": step,
            "loss": mean,
            "gnorm": gnorm,
            **self._live.readback(),
            **({} if base_lr is None else {"base_lr": base_lr}),
            "clip_norm": plan.clip_norm,
            "bsz": plan.batch,
            "wpb": plan.batch * plan.tokens,
        }
        if not math.isfinite(mean) or not (gnorm is None or math.isfinite(gnorm)):
            self._write(applied=False)
            raise NotFiniteError(f"the loss or the gradient norm of update {step} is not finite; it was not applied")
        return mean

    def after_update(self, *, skipped: bool = False) -> bool:
        """Write the line of the update. Returns whether to save now: :meth:`save`.

        Args:
            skipped: the weights are as before, because a gradient scaler found an overflow. The data are used up.
        """
        self.skipped += skipped
        self._write(applied=True, skipped=skipped)
        every = self._plan.checkpoint_every
        return self._agreed.save or self.step == self._plan.steps or bool(every and self.step % every == 0)

    def leave_out_seconds(self, seconds: float) -> None:
        """Do not count ``seconds``, in which the model was evaluated, as time of the next update."""
        self._since += seconds

    def save(self, write: Callable[[Path], Written], state: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint of the last update. A save that fails is reported in the next line of telemetry.

        Args:
            write: writes the part of this rank into the folder that it gets.
            state: more fields of the manifest.

        Raises:
            SupersededError: a newer attempt exists.
            CheckpointError: the save is stale, or a resume would refuse it.
            OSError: the last checkpoint of the run could not be saved.
        """
        self.folder.phase(PhaseName.SAVING, self.step)
        began = time.monotonic()
        header = {
            "layout": {"world": self.world},
            "data_position": self.position,
            "tokens": self.tokens,
            "settings_digest": "",
            "schedule": self._plan.schedule,
            "lr_factors": self.options.lr_factors,
            "skips": self.options.skips,
            "telemetry": self._line,
        }
        try:
            self._checkpoints.save(self.step, write, header | dict(state or {}))
            self.weights_moved = False
        except OSError as error:
            if self.step == self._plan.steps:
                raise
            self._save_error = f"{type(error).__name__}: {error}"[:300]
            log.warning("step %d was not saved, training continues: %s", self.step, self._save_error)
        self._save_seconds = time.monotonic() - began
        self.folder.phase(PhaseName.ENDING if self.step == self._plan.steps else PhaseName.TRAINING, self.step)

    def _write(self, *, applied: bool, skipped: bool = False) -> None:
        plan, now = self._plan, time.monotonic()
        seconds, self._since = max(now - self._since, 1e-9), now
        if applied:
            self.position = self.next_sample() + plan.batch
            self.step += 1
            if not skipped:
                self.tokens += plan.batch * plan.tokens
                self.weights_moved |= self._line["lr"] > 0.0
        self._line |= {
            "step_seconds": seconds,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "wps": plan.batch * plan.tokens / seconds,
            "data_position": self.position,
            "save_seconds": self._save_seconds,
            "save_error": self._save_error,
        }
        self._line = self.folder.telemetry(**self._line)
        self._save_seconds, self._save_error = 0.0, None
