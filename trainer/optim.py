"""The optimizer as OPT had it, its schedule, and what it says of itself."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.recipes import OptimConfig


def learning_rate(step: int, config: OptimConfig, lr_factors: Sequence[tuple[int, float]] = ()) -> float:
    """Learning rate of update ``step`` (from 1): linear warm-up, linear decay, constant after ``total_steps``.

    Args:
        step: number of the update.
        config: peak, warm-up and decay.
        lr_factors: (step, factor) pairs; each multiplies the schedule in every update after its step.
    """
    decayed = max(0, min(step, config.total_steps) - config.warmup_steps)
    decay = 1 - (1 - config.final_fraction) * decayed / (config.total_steps - config.warmup_steps)
    factors = math.prod(factor for after, factor in lr_factors if after < step)
    return config.peak_lr * min(step / config.warmup_steps, decay) * factors


def build(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over (sharded) ``parameters``, its state allocated, so that a checkpoint can be read into it.

    Weight decay is decoupled and applies to all parameters, biases and norms included: metaseq's FSDP flattened them
    into one tensor per layer, so OPT was trained that way.
    """
    optimizer = torch.optim.AdamW(parameters, **settings(config))
    optimizer.param_groups[0]["clip_norm"] = config.clip_norm
    allocate(optimizer)
    return optimizer


def settings(config: OptimConfig) -> dict[str, Any]:
    """What AdamW is made with."""
    return {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay, "fused": True}


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW its state, as it stands before the first update."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of this update, whether it is applied or skipped: telemetry reads it back."""
    optimizer.param_groups[0]["lr"] = lr


def update(
    optimizer: torch.optim.Optimizer, gradients: Iterable[Tensor], gnorm: float, loss_scale: float | None = None
) -> None:
    """Clip ``gradients`` and apply them.

    Args:
        optimizer: over their parameters.
        gradients: this rank's part of them, of a loss that was multiplied by ``loss_scale``.
        gnorm: their global norm, without that factor.
        loss_scale: in fp16.
    """
    clip_norm = optimizer.param_groups[0]["clip_norm"]
    factor = clip_norm / gnorm if gnorm > clip_norm else 1.0
    factor /= loss_scale or 1.0
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    optimizer.step()


def readback(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the live optimizer uses, under telemetry's names: a configuration can be right and the optimizer wrong."""
    group = optimizer.param_groups[0]
    return {
        "lr": float(group["lr"]),
        "betas": [float(beta) for beta in group["betas"]],
        "weight_decay": float(group["weight_decay"]),
        "clip_norm": float(group["clip_norm"]),
    }
