"""Puts a ``transformers.Trainer`` under the supervisor, by one line.

Import this module before transformers: it installs the handlers of signals, and takes the supervisor's options off the
command line, so that the script's own parser does not meet them. Then::

    trainer = Trainer(model=model, args=args, train_dataset=data)
    supervise(trainer)
    trainer.train()

Without ``--run-dir``, nothing changes.
"""

import inspect
import os
from collections.abc import Sequence
from typing import Any

from opt_ops.contract.options import take
from opt_ops.contract.signals import Signals

_options = take()
_signals = Signals() if _options.supervised else None

import torch  # noqa: E402  the handlers of signals come first: the imports below take many seconds
import transformers  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from opt_ops.contract import Options, PhaseName, UserError, leaving_on_faults, place_from_environment  # noqa: E402
from opt_ops.integrations import transformers_checkpoint, transformers_settings  # noqa: E402
from opt_ops.integrations.rank import Plan, SupervisedRank  # noqa: E402
from opt_ops.integrations.settings import refuse_unsupported  # noqa: E402
from opt_ops.integrations.transformers_data import WindowSampler  # noqa: E402
from opt_ops.integrations.transformers_schedule import UNKNOWN, schedule_of, unknown  # noqa: E402

_say_to_all = os.environ.get("RANK", "0") == "0"


def supervise(trainer: Trainer) -> None:
    """Let the supervisor watch and steer ``trainer``. Call it before ``trainer.train()``.

    What it sets in the trainer's arguments is printed. If something cannot work, or if ``train()`` is left by an error,
    the process ends with the exit code of the contract.

    Args:
        trainer: of any class that derives from ``transformers.Trainer``.
    """
    if _options.supervised:
        callback = OptOpsCallback(_options)
        with leaving_on_faults():
            callback.attach(trainer, change=True)
            trainer.add_callback(callback)


class OptOpsCallback(TrainerCallback):
    """Supervision for those who build a Trainer of their own: ``Trainer(…, callbacks=[OptOpsCallback(options)])``.

    It changes no argument that breaks a promise to the supervisor: it refuses it, with exit code 78.

    Args:
        options: from ``opt_ops.contract.parse()``. Without a ``run_dir``, the callback does nothing.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._trainer: Any = None
        self._losses: list[torch.Tensor] = []
        self._gnorm: float | None = None
        self._nan = False
        self._rates: list[Any] = []

    def attach(self, trainer: Trainer, *, change: bool = False) -> None:
        """Take the trainer's data, saves and updates into supervision. :func:`supervise` does it.

        Args:
            trainer: built, and not yet training.
            change: whether to set arguments that break a promise, rather than refuse them.

        Raises:
            UserError: an option, a setting or an argument cannot work.
            CheckpointError: the checkpoint to continue from is missing, torn, damaged or stale.
        """
        refuse_unsupported(self._options)
        self._trainer = trainer
        args: Any = trainer.args
        read: set[str] = getattr(self._options.settings, "read", set())
        self._given = transformers_settings.apply(args, self._options.settings, read, _say)
        keep = args.save_total_limit or 0
        if args.save_strategy not in ("steps", "epoch") and "save_steps" not in self._given.names:
            args.save_steps = 0
        self._epochs_between_saves = args.save_strategy == "epoch" and "save_steps" not in self._given.names
        transformers_settings.keep_promises(args, _say, change=change)
        trainer._train_batch_size = args.train_batch_size
        if args.world_size != place_from_environment(os.environ).world:
            raise UserError(
                f"transformers sees {args.world_size} ranks, and the supervisor has started "
                f"{place_from_environment(os.environ).world}: let RANK and WORLD_SIZE pass, and no launcher between."
            )
        self._keep = keep
        self._rank = SupervisedRank(self._options, _signals or Signals())
        self._scheduler_is_ours = (
            trainer.lr_scheduler is None and type(trainer).create_scheduler is Trainer.create_scheduler
        )
        self._optimizer_is_ours = trainer.optimizer is None
        self._sampler: WindowSampler | None = None
        self._keep_batch(args)
        self._wrap(trainer)

    def _keep_batch(self, args: Any) -> None:
        """On another number of ranks, keep the number of samples of an update."""
        trainer, before = self._trainer, self._rank.resumed
        self._batch = trainer.get_total_train_batch_size(args)
        kept = before.telemetry.get("bsz") if before else None
        if before is None or not kept or kept == self._batch or before.layout.get("world") == self._rank.world:
            return
        micro = self._batch // args.gradient_accumulation_steps
        if kept % micro:
            raise UserError(
                f"{self._options.resume} was trained with {kept:.0f} samples an update, and {self._rank.world} ranks "
                f"take {micro} at a time: set per_device_train_batch_size so that {kept:.0f} is a multiple of it."
            )
        args.gradient_accumulation_steps, self._batch = int(kept) // micro, int(kept)
        _say(f"gradient_accumulation_steps={int(kept) // micro}: {int(kept)} samples an update, as before")

    def _wrap(self, trainer: Any) -> None:
        """Trainer has no public hooks for these. An attribute of this one trainer hides the method of its class."""
        train, evaluate, step = trainer.train, trainer.evaluate, trainer.training_step
        loss_of, clip, make_scheduler = (
            trainer.compute_loss,
            trainer.accelerator.clip_grad_norm_,
            trainer.create_scheduler,
        )
        sampler_of = trainer._get_train_sampler

        def supervised_train(resume_from_checkpoint: Any = None, *others: Any, **named: Any) -> Any:
            with leaving_on_faults():
                path = str(self._options.resume) if self._options.resume else None
                if resume_from_checkpoint not in (None, False, path):
                    _say(f"train() continues from {path or 'the beginning'}, not from {resume_from_checkpoint}")
                self._plan(trainer.args)
                return train(path, *others, **named)

        def supervised_evaluate(*others: Any, **named: Any) -> Any:
            self._rank.folder.phase(PhaseName.EVALUATION, self._rank.step)
            try:
                return evaluate(*others, **named)
            finally:
                phase = PhaseName.TRAINING if trainer.is_in_train else PhaseName.ENDING
                self._rank.folder.phase(phase, self._rank.step)

        def supervised_step(*others: Any, **named: Any) -> torch.Tensor:
            loss = step(*others, **named)
            self._losses.append(loss * float("nan") if self._nan else loss)
            return loss

        def supervised_loss(*others: Any, **named: Any) -> Any:
            found = loss_of(*others, **named)
            if not self._nan or not torch.is_grad_enabled():
                return found
            return (found[0] * float("nan"), *found[1:]) if isinstance(found, tuple) else found * float("nan")

        def supervised_clip(*others: Any, **named: Any) -> Any:
            norm = clip(*others, **named)
            whole: Any = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            self._gnorm = None if whole is None else float(whole)
            return norm

        def supervised_scheduler(*others: Any, **named: Any) -> Any:
            self._start(trainer)
            return make_scheduler(*others, **named)

        trainer.train, trainer.evaluate, trainer.training_step = supervised_train, supervised_evaluate, supervised_step
        trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = supervised_loss, supervised_clip
        trainer.create_scheduler = supervised_scheduler
        trainer._save_checkpoint = lambda *_, **__: self._save(trainer)
        trainer._get_train_sampler = lambda *given: self._windows(trainer, sampler_of(*given))

    def _plan(self, args: Any) -> None:
        """What can be known before transformers makes optimizer and scheduler."""
        data = self._trainer.train_dataset
        if isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__len__"):
            raise UserError(
                "train_dataset is an IterableDataset: no batch can be left out, and no resume can find its place. "
                "Give a data set with __getitem__ and __len__."
            )
        epoch = len(data) // self._batch
        if left := len(data) % self._batch:
            _say(f"the last {left} samples of each epoch are left out: an update takes {self._batch}")
        self._steps = args.max_steps if args.max_steps > 0 else -(-int(args.num_train_epochs * epoch * 1000) // 1000)
        if self._epochs_between_saves:
            args.save_steps = max(1, epoch)
        every = args.save_steps
        self._every = int(every) if every >= 1 or not every else -int(-every * self._steps // 1)

    def _windows(self, trainer: Any, original: Any) -> WindowSampler:
        args = trainer.args
        self._sampler = WindowSampler(
            original,
            samples=len(trainer.train_dataset),
            batch=self._batch,
            seed=args.seed if args.data_seed is None else args.data_seed,
            steps=self._steps,
            skips=self._options.skips,
            trained=self._rank,
        )
        return self._sampler

    def _start(self, trainer: Any) -> None:
        """Write config.json, when there is an optimizer, and no state has been loaded into it yet."""
        args, given = trainer.args, self._given
        groups = trainer.optimizer.param_groups
        first: Any = max(groups, key=lambda group: float(group.get("initial_lr", group["lr"])))
        in_optimizer = float(first.get("initial_lr", first["lr"]))
        peak = args.learning_rate if self._optimizer_is_ours or "learning_rate" in given.names else in_optimizer
        set_betas = self._optimizer_is_ours or "adam_beta1" in given.names
        betas = (args.adam_beta1, args.adam_beta2) if set_betas else tuple(first.get("betas", ()))
        decays = [float(group.get("weight_decay") or 0.0) for group in groups]
        decay = args.weight_decay if self._optimizer_is_ours or "weight_decay" in given.names else max(decays)
        schedule = self._schedule(args, peak)
        self._kind = schedule["kind"]
        plan = Plan(
            steps=self._steps,
            schedule=schedule,
            betas=betas if "betas" in first else (),
            weight_decay=decay,
            clip_norm=args.max_grad_norm or 0.0,
            batch=self._batch,
            tokens=_tokens_of(trainer.train_dataset),
            checkpoint_every=self._every,
            keep=self._keep,
            about={"framework": f"transformers {transformers.__version__}"},
        )
        self._rank.start(plan, trainer.optimizer)

    def _schedule(self, args: Any, peak: float) -> dict[str, Any]:
        given = self._given
        if not self._scheduler_is_ours:
            name = type(self._trainer.lr_scheduler or self._trainer).__name__
            if bad := given.names & {"learning_rate", "warmup_steps", "lr_scheduler_type"}:
                raise UserError(f"--set: the script makes its own scheduler ({name}), so {min(bad)} has no effect.")
            schedule = unknown(name)
        else:
            try:
                schedule = schedule_of(args, peak, given.total_steps or self._steps, self._steps)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"lr_scheduler_type={args.lr_scheduler_type}: {error}") from error
        for name, value in (("total_steps", given.total_steps), ("final_fraction", given.final_fraction)):
            if value is not None and name not in schedule:
                if name == "total_steps" and schedule["kind"] == "table":
                    continue
                raise UserError(f"--set optim.{name}={value}: the schedule {schedule['kind']} has no {name}.")
        return schedule if given.final_fraction is None else schedule | {"final_fraction": given.final_fraction}

    def _save(self, trainer: Any) -> None:
        moved = max(float(rate) for rate in self._used) > 0.0
        self._rank.save(lambda path: transformers_checkpoint.write(trainer, path, self._rank.rank, weights_moved=moved))

    # What Trainer calls, in the order of a training.

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Attach to the trainer that is being built with this callback."""
        if self._options.supervised and self._trainer is None:
            with leaving_on_faults():
                self.attach(_calling_trainer())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Take the signals back from whoever took them, and end at once if nothing is left to train."""
        if not self._options.supervised:
            return None
        if self._trainer is None:
            raise UserError(
                "OptOpsCallback was added after the Trainer was built: call supervise(trainer), or build it with "
                "callbacks=[OptOpsCallback(options)]."
            )
        self._rank.outside.signals.install()
        control.should_training_stop = self._rank.step >= self._steps
        return control

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin an update."""
        if self._trainer is None:
            return
        if self._sampler is None or not self._sampler.begun:
            raise UserError("the trainer's data loader does not ask _get_train_sampler: windows cannot be left out.")
        self._losses, self._gnorm = [], None
        self._nan = self._rank.begin_update()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree on the update; set what it uses, whatever a scheduler or a checkpoint has left, and read it back."""
        if self._trainer is None:
            return
        self._nan = False
        groups = self._trainer.optimizer.param_groups
        self._rates = [_copy(group["lr"]) for group in groups]
        loss, gnorm = float(sum(self._losses)), self._gnorm
        if self._trainer.accelerator.scaler is not None and gnorm is not None and not _finite(gnorm) and _finite(loss):
            gnorm = None  # the scaler of fp16 skips this update and lowers the scale; that is no fault
        base = max(map(float, self._rates)) if self._kind == UNKNOWN else None
        self._rank.before_update(loss, gnorm, base)
        self._used = [float(group["lr"]) for group in groups]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the scheduler its own rates back: some compute the next rate from the last one."""
        for group, rate in zip(self._trainer.optimizer.param_groups if self._trainer else (), self._rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Write the line of the update, and decide about a save."""
        if self._trainer is None:
            return None
        skipped = bool(self._trainer.accelerator.optimizer_step_was_skipped)
        control.should_save = self._rank.after_update(skipped=skipped)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Save nothing: that is decided after each update."""
        if self._trainer is not None:
            control.should_save = False
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse an end before the last update."""
        if self._trainer is not None and self._rank.step < self._steps:
            raise UserError(
                f"training was stopped after update {self._rank.step} of {self._steps}: no callback may end it early "
                "under supervision."
            )


def _say(text: str) -> None:
    if _say_to_all:
        print(f"opt-ops: {text}", flush=True)


def _finite(number: float) -> bool:
    return number - number == 0.0


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, torch.Tensor) else rate


def _tokens_of(data: Any) -> int:
    """The tokens of the first sample, taken for all; 1 where samples have none."""
    first = data[0]
    ids: Sequence[int] | None = first.get("input_ids") if isinstance(first, dict) else None
    return len(ids) if ids is not None and hasattr(ids, "__len__") else 1


def _calling_trainer() -> Any:
    """The trainer that calls its callbacks: it does not pass itself to them."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise UserError("OptOpsCallback was called by something else than a transformers.Trainer.")
