"""What ``--set`` changes in a hand-written loop: the contract's words, and settings that the script itself reads."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from opt_ops.contract import Options, UserError, leave, lr_of
from opt_ops.contract.schedule import KINDS
from opt_ops.integrations.rank import Plan
from opt_ops.integrations.settings import Settings, betas, number, whole
from opt_ops.integrations.this_process import OPTIONS

Schedule = Mapping[str, Any] | Callable[[int], float]

_Value = TypeVar("_Value", bool, int, float, str)

_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("total_steps", "final_fraction"),
    "cosine": ("total_steps", "final_fraction", "cycles"),
    "polynomial": ("total_steps", "final_fraction", "power"),
    "constant": (),
    "wsd": ("total_steps", "final_fraction", "decay_steps", "decay"),
}
_FIELDS: dict[str, tuple[str, ...]] = {
    kind: ("kind", "delay", "peak_lr", "warmup_steps", "warmup_from", *own) for kind, own in _OWN_FIELDS.items()
}
_FIELDS["table"] = ("kind", "delay", "knots")

_WORDS = {"peak_lr": number, "warmup_steps": whole(0), "total_steps": whole(1), "final_fraction": number}
"""The words of the contract for a schedule, after ``optim.``."""

_taken: dict[str, Any] = {}


def setting(key: str, default: _Value) -> _Value:
    """A setting of the script: the value of ``--set KEY=VALUE``, as the type of ``default``; else ``default``.

    Call it before ``supervised``: settings that nobody has asked for are refused there.

    A value of another type ends the process with exit code 78.
    """
    _taken[key] = default
    text = OPTIONS.settings.get(key)
    if text is None:
        return default
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        leave(UserError(f"--set {key}={text}: expected {expected}."))


def plan_of(
    options: Options,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Schedule,
    steps: int,
    checkpoint_every: int,
    clip_norm: float,
    **others: Any,
) -> tuple[Plan, Callable[[int], float] | None]:
    """The plan of a script, with the settings of the command line in it.

    Args:
        options: of this process.
        optimizer: has betas and weight decay.
        schedule: fields as in ``config.json``, or a function of the number of the update, from 1.
        steps: the last update.
        checkpoint_every: updates between saves.
        clip_norm: the norm that gradients are clipped to; 0: they are not clipped.
        others: the other fields of the plan.

    Returns:
        The plan, and the function where the schedule is one.

    Raises:
        UserError: a setting is unknown or has a bad value, or the schedule lacks a field or has an unknown one.
    """
    settings = Settings({key: text for key, text in options.settings.items() if key not in _taken})
    known = ["steps", "checkpoint_every", "optim.clip_norm"]
    fields: dict[str, Any] = {"kind": "function"} if callable(schedule) else {"kind": "linear", **schedule}
    words = () if callable(schedule) else [word for word in _WORDS if word in _fields_of(fields)]
    for word in words:
        known.append(f"optim.{word}")
        value = settings.take(f"optim.{word}", _WORDS[word], None)
        if value is not None:
            fields[word] = value
    groups = optimizer.param_groups
    both: tuple[float, ...] = tuple(groups[0].get("betas", ()))
    if both:
        known.append("optim.betas")
        both = settings.take("optim.betas", betas, both)
    decay = max(float(group.get("weight_decay", 0.0)) for group in groups)
    if any("weight_decay" in group for group in groups):
        known.append("optim.weight_decay")
        decay = settings.take("optim.weight_decay", number, decay)
    plan = Plan(
        steps=settings.take("steps", whole(1), steps),
        schedule=fields,
        betas=both,
        weight_decay=decay,
        clip_norm=settings.take("optim.clip_norm", number, clip_norm),
        checkpoint_every=settings.take("checkpoint_every", whole(0), checkpoint_every),
        **others,
    )
    settings.require_all_taken(", ".join([*known, *_taken]))
    if not callable(schedule):
        _require_schedule(fields)
    return plan, schedule if callable(schedule) else None


def _fields_of(schedule: Mapping[str, Any]) -> tuple[str, ...]:
    if schedule["kind"] not in KINDS:
        raise UserError(
            f"the schedule has the kind {schedule['kind']!r}; known are {', '.join(KINDS)}. For any other, "
            "give a function of the number of the update."
        )
    return _FIELDS[schedule["kind"]]


def _require_schedule(schedule: Mapping[str, Any]) -> None:
    kind, fields = schedule["kind"], _fields_of(schedule)
    if unknown := [name for name in schedule if name not in fields]:
        raise UserError(f"a schedule of the kind {kind!r} has no field {unknown[0]!r}. It has: {', '.join(fields)}.")
    try:
        for step in (1, 10**9):  # in the warm-up, if there is one, and after it
            lr_of(schedule, (), step)
    except ValueError as error:
        raise UserError(f"{error}.") from None
