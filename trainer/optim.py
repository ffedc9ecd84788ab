"""The optimizer as OPT had it, its schedule, and what it says of itself."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

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


def build(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the (sharded) parameters of ``model``, its state allocated, so that a checkpoint can be read into it.

    Weight decay is decoupled and applies to all parameters, biases and norms included: metaseq's FSDP flattened them
    into one tensor per layer, so OPT was trained that way.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    optimizer.param_groups[0]["clip_norm"] = config.clip_norm
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def update(optimizer: torch.optim.Optimizer, gnorm: float, lr: float) -> None:
    """Clip the gradients, whose global norm is ``gnorm``, and apply them with learning rate ``lr``."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    if gnorm > group["clip_norm"]:
        for gradient in _local_gradients(group["params"]):
            gradient.mul_(group["clip_norm"] / gnorm)
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


def square_norm_share(parameters: Iterable[nn.Parameter]) -> Tensor:
    """This rank's share of the squared global l2 norm of the gradients: the shares of all ranks add up to it.

    It leaves the sum over ranks to the caller, who has one collective a step for everything. What several ranks hold
    alike, as tensor parallelism's layer norms, counts once. Returns a float64 scalar.
    """
    gradients: defaultdict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        mesh = gradient.device_mesh
        copies = math.prod(mesh.size(i) for i, p in enumerate(gradient.placements) if p.is_replicate())
        gradients[copies].append(gradient.to_local())
    shares = [get_total_norm(local).double() ** 2 / copies for copies, local in gradients.items()]
    return torch.stack(shares).sum()


def _local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
