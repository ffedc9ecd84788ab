"""The settings of the optimizer and of its learning-rate schedule."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

_FALLING = ("total_steps", "final_fraction")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "linear": _FALLING,
    "cosine": (*_FALLING, "cycles"),
    "polynomial": (*_FALLING, "exponent"),
    "constant": (),
    "wsd": (*_FALLING, "decay_steps", "decay"),
}
"""The settings that a kind of schedule has beside peak and warm-up."""
_OTHERS = frozenset({"schedule", "cycles", "exponent", "decay_steps", "decay"})
"""Settings that only other kinds than ``linear`` have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up to ``peak_lr``, then what ``schedule`` says.

    ``linear``, ``cosine`` and ``polynomial`` reach ``final_fraction`` of the peak at ``total_steps``. ``constant``
    stays. ``wsd`` stays until the last ``decay_steps``, in which it falls as ``decay`` says. ``docs/formats.md`` has
    the formulas, and what ``cycles`` and ``exponent`` (there ``power``) do.
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: Literal["linear", "cosine", "polynomial", "constant", "wsd"] = "linear"
    cycles: float = 0.5
    exponent: float = 1.0
    decay_steps: int = 0
    decay: Literal["linear", "cosine", "sqrt"] = "linear"


def stated(config: OptimConfig) -> dict[str, Any]:
    """The schedule as ``config.json`` states it. Of the kind ``linear`` it does not name the kind."""
    kind = {} if config.schedule == "linear" else {"kind": config.schedule}
    names = ("peak_lr", "warmup_steps", *_FIELDS[config.schedule])
    return kind | {"power" if name == "exponent" else name: getattr(config, name) for name in names}


def decisive(config: OptimConfig) -> dict[str, Any]:
    """The settings that decide the weights. Those of a linear schedule are as before there were others."""
    used = {*_FIELDS[config.schedule], *(("schedule",) if config.schedule != "linear" else ())}
    return {name: value for name, value in asdict(config).items() if name not in _OTHERS or name in used}


def check(config: OptimConfig, require: Callable[[bool, str], None]) -> None:
    """Call ``require`` with each rule: whether it holds, and its sentence."""
    require(config.warmup_steps < config.total_steps, "optim.warmup_steps must be below optim.total_steps")
    require(all(0 <= beta < 1 for beta in config.betas), "both of optim.betas must be at least 0 and below 1")
    for key, value in (("peak_lr", config.peak_lr), ("eps", config.eps), ("clip_norm", config.clip_norm)):
        require(value > 0, f"optim.{key} must be above 0")
    require(0 <= config.final_fraction <= 1, "optim.final_fraction must be a share, from 0 to 1")
    require(config.weight_decay >= 0, "optim.weight_decay must not be negative")
    for key, value in (("cycles", config.cycles), ("exponent", config.exponent)):
        require(0 < value <= 1e6, f"optim.{key} must be above 0 and at most 1e6")
    if config.schedule == "wsd":
        most = config.total_steps - config.warmup_steps
        require(
            0 < config.decay_steps <= most,
            f"optim.decay_steps must be from 1 to {most}, the steps after the warm-up",
        )
