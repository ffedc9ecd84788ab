"""The settings of ``--set`` in the names of ``transformers.TrainingArguments``, and what supervision itself sets."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser

from opt_ops.contract import UserError
from opt_ops.integrations.settings import Settings, betas

Say = Callable[[str], None]

PROMISES: Mapping[str, Any] = {
    "logging_steps": 1,
    "logging_strategy": "steps",
    "logging_nan_inf_filter": False,
    "save_total_limit": None,
    "save_strategy": "steps",
    "ignore_data_skip": False,
    "dataloader_drop_last": True,
    "save_on_each_node": False,
}
"""What supervision needs. :func:`supervise` sets it; with the callback alone, other values are refused."""

_ASIDE = ("logging_steps", "logging_strategy", "dataloader_drop_last", "save_on_each_node")
"""Those of them that break no promise: they are set with the callback alone, too."""

_REFUSED: Mapping[str, tuple[Any, str]] = {
    "auto_find_batch_size": (True, "it changes the batch, and so the order of data"),
    "load_best_model_at_end": (True, "checkpoints are pruned by other rules, and the best one may be gone"),
    "push_to_hub": (True, "checkpoints are not pushed; push the model at the end of the script"),
    "save_only_model": (True, "without optimizer state no attempt can resume"),
    "train_sampling_strategy": ("batch_rebalance", "its batches have no constant number of samples"),
}
_REFUSED_OPTIMIZERS = ("lomo", "adalomo", "layerwise")
"""They update weights in the backward pass: a loss that is not finite could not be kept from them."""

_BUILT_WITH = (
    *("accelerator_config", "bf16", "bf16_full_eval", "ddp_backend", "ddp_timeout", "deepspeed", "disable_tqdm"),
    *("enable_jit_checkpoint", "fp16", "fp16_full_eval", "fsdp", "fsdp_config", "full_determinism", "hub_model_id"),
    *("hub_strategy", "label_names", "label_smoothing_factor", "log_level", "log_level_replica", "neftune_noise_alpha"),
    *("output_dir", "parallelism_config", "place_model_on_device", "project", "push_to_hub", "report_to", "seed"),
    *("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cache", "use_cpu"),
)
"""What a model or a Trainer is built with: too late to set when supervision begins."""

_WORDS = {
    "steps": "max_steps",
    "checkpoint_every": "save_steps",
    "optim.peak_lr": "learning_rate",
    "optim.warmup_steps": "warmup_steps",
    "optim.weight_decay": "weight_decay",
    "optim.clip_norm": "max_grad_norm",
}
_OTHER_WORDS = ("optim.betas", "optim.total_steps", "optim.final_fraction")


class Given:
    """What ``--set`` has set, beside the arguments.

    Attributes:
        total_steps: the update at which the decay ends; None: the last update.
        final_fraction: the end of the decay; None: what the scheduler has.
        names: the arguments that were set.
    """

    def __init__(self) -> None:
        self.total_steps: int | None = None
        self.final_fraction: float | None = None
        self.names: set[str] = set()


def apply(args: Any, settings: Mapping[str, str], read: set[str], say: Say) -> Given:
    """Set the arguments that ``--set`` names.

    Args:
        args: the trainer's arguments, changed in place.
        settings: of ``--set``.
        read: keys that the script itself has read; they are its own matter, whatever their name.
        say: prints what was set.

    Raises:
        UserError: a key is unknown, a value is bad, or it comes too late.
    """
    given = Given()
    left = Settings({key: value for key, value in settings.items() if key not in read or key in _WORDS})
    given.total_steps = left.take("optim.total_steps", _positive, None)
    given.final_fraction = left.take("optim.final_fraction", _fraction, None)
    if (pair := left.take("optim.betas", betas, None)) is not None:
        args.adam_beta1, args.adam_beta2 = pair
        given.names |= {"adam_beta1", "adam_beta2"}
        say(f"--set optim.betas: adam_beta1={pair[0]}, adam_beta2={pair[1]}")
    parser = _parser(type(args))
    known = {field.name for field in fields(args) if field.init}
    for key, text in left.rest().items():
        name = _WORDS.get(key, key)
        if name not in known:
            raise UserError(
                f"--set {key}={text}: this trainer has no setting {key}. It has those of "
                f"{type(args).__name__}, and {', '.join([*_WORDS, *_OTHER_WORDS])}."
            )
        if name in _BUILT_WITH:
            raise UserError(
                f"--set {key}={text}: the model and the trainer are already built. Read it in the script: "
                "opt_ops.contract.parse().settings, before they are."
            )
        parser.about = f"--set {key}={text}"
        value = getattr(parser.parse_args([f"--{name}={text}"]), name)
        _set(args, name, _as_dict(value) if name.endswith("_kwargs") else value)
        given.names.add(name)
        set_to = getattr(args, name)
        say(f"--set {key}: {name}={getattr(set_to, 'value', set_to)}")
    return given


def keep_promises(args: Any, say: Say, *, change: bool) -> None:
    """Set what supervision needs, and refuse what it cannot do.

    Args:
        args: the trainer's arguments, changed in place.
        say: prints what was set.
        change: whether to set what breaks a promise; otherwise it is refused.

    Raises:
        UserError: an argument breaks a promise.
    """
    for name, wanted in PROMISES.items():
        value = getattr(args, name, wanted)
        if value == wanted:
            continue
        if not change and name not in _ASIDE:
            raise UserError(f"{name}={value} breaks a promise to the supervisor: set {name}={wanted}.")
        _set(args, name, wanted)
        say(f"{name}={wanted} (was {getattr(value, 'value', value)})")
    for name, (bad, why) in _REFUSED.items():
        if getattr(args, name, None) == bad:
            raise UserError(f"{name}={bad} is not supported under supervision: {why}.")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(part in optimizer for part in _REFUSED_OPTIMIZERS):
        raise UserError(f"optim={optimizer} is not supported under supervision: it updates in the backward pass.")
    if args.accelerator_config.split_batches:
        raise UserError("split_batches=True is not supported under supervision: give the batch of one device.")


def _set(args: Any, name: str, value: Any) -> None:
    """Set an argument as its constructor would: words become members of their enumeration."""
    old = getattr(args, name, None)
    kind: Any = type(old)
    if isinstance(value, str) and not isinstance(value, kind) and hasattr(kind, "__members__"):
        try:
            value = kind(value)
        except ValueError:
            raise UserError(
                f"--set {name}={value}: expected one of {', '.join(each.value for each in kind)}."
            ) from None
    setattr(args, name, value)


def _as_dict(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise UserError(f'expected JSON, for example {{"num_cycles": 2}}, not {value}.') from None


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError("expected a whole number from 1 on.")
    return number


def _fraction(text: str) -> float:
    if not 0.0 <= (number := float(text)) <= 1.0:
        raise ValueError("expected a number from 0 to 1.")
    return number


def _parser(kind: Any) -> Any:
    class Parser(HfArgumentParser):
        """Knows the type of each argument."""

        about = ""

        def error(self, message: str) -> NoReturn:
            raise UserError(f"{self.about}: {message}")

    return Parser(kind, add_help=False, allow_abbrev=False)
