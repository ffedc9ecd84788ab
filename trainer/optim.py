"""The optimizer with OPT's settings, its learning-rate schedule, and the values that it really uses."""

# torch does not list its foreach functions.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt_ops.contract.learning_rate import total_lr_factor
from opt_ops.contract.schedule import lr_of
from opt_ops.contract.telemetry import OptimizerFields
from trainer.optim_config import OptimConfig, stated


def learning_rate(step: int, config: OptimConfig, lr_factors: Sequence[tuple[int, float]] = ()) -> float:
    """Learning rate of update ``step`` (from 1), by the schedule and the factors in force.

    Args:
        step: number of the update.
        config: names the schedule, with its settings.
        lr_factors: (step, factor) pairs; each multiplies the schedule in every update after its step.
    """
    if config.schedule != "linear":
        lr = lr_of(stated(config), lr_factors, step)
        assert lr is not None  # a kind that is not in the contract is none of the settings
        return lr
    # Not by lr_of, whose last bits differ: training under the default schedule is to stay what it was, bit by bit.
    decayed = max(0, min(step, config.total_steps) - config.warmup_steps)
    decay = 1 - (1 - config.final_fraction) * decayed / (config.total_steps - config.warmup_steps)
    return config.peak_lr * min(step / config.warmup_steps, decay) * total_lr_factor(step, lr_factors)


def build(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over ``parameters``, which may be sharded. Its state is allocated, so a checkpoint can be read into it.

    Weight decay is decoupled and applies to all parameters, biases and norms included. OPT was trained that way,
    because metaseq's FSDP flattened the parameters of a layer into one tensor.
    """
    optimizer = torch.optim.AdamW(parameters, **settings(config))
    optimizer.param_groups[0]["clip_norm"] = config.clip_norm
    allocate(optimizer)
    return optimizer


def settings(config: OptimConfig) -> dict[str, Any]:
    """The arguments of AdamW."""
    return {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay, "fused": True}


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of AdamW as it is before the first update."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of an update. Do this also for an update that is skipped: telemetry reads it back."""
    optimizer.param_groups[0]["lr"] = lr


def gradient_factor(optimizer: torch.optim.Optimizer, gnorm: float | Tensor, divisor: float) -> Tensor:
    """What gradients are multiplied by in an update: it clips them, and takes out what they are too large by.

    Args:
        optimizer: for its ``clip_norm``.
        gnorm: global norm of the gradients of the mean loss.
        divisor: what the gradients in the parameters are larger by.

    Returns:
        An fp32 scalar, on the device of ``gnorm``.
    """
    clip_norm = optimizer.param_groups[0]["clip_norm"]
    norm = torch.as_tensor(gnorm, dtype=torch.float64)
    return (clip_norm / divisor / norm.clamp(min=clip_norm)).float()


def update(
    optimizer: torch.optim.Optimizer,
    factor: Tensor,
    *,
    unless: Tensor | None = None,
    step: Callable[[], object] | None = None,
) -> None:
    """Apply the gradients times ``factor``. AdamW multiplies them in its own pass.

    The host waits for the device only where parameters are offloaded: then the two scalars are needed on the host.

    Args:
        optimizer: AdamW over the parameters that hold the gradients. It may overwrite these.
        factor: an fp32 scalar (:func:`gradient_factor`).
        unless: a boolean scalar. Where it is true, weights, moments and step counts stay as they are.
        step: what starts the optimizer, where that is not ``optimizer.step``.
    """
    parameters = optimizer.param_groups[0]["params"]
    device = parameters[0].device if parameters else factor.device
    # AdamW's own names: it divides gradients by ``grad_scale``, and does nothing where ``found_inf`` is 1. Both must be
    # on its device: torch would copy them to a host without waiting for the copy.
    optimizer.grad_scale = factor.reciprocal().to(device)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = None if unless is None else unless.float().to(device)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        (step or optimizer.step)()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


class FusedUpdate:
    """The update of AdamW as the op ``adamw``: gradients, weights and moments in one pass, clipping included.

    Args:
        optimizer: AdamW. Its settings and its state are used, and not its ``step``.
        parameters: of the optimizer.
        local: gives this rank's part of a parameter, of its gradient or of a moment.
        op: :func:`trainer.kernels.adamw.fused`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        local: Callable[[Tensor], Tensor],
        op: Callable[..., Tensor],
    ) -> None:
        self._optimizer, self._parameters, self._local, self._op = optimizer, parameters, local, op
        self._count: StepCount | None = None

    @torch.no_grad()
    def __call__(self, factor: Tensor, unless: Tensor | None = None) -> Tensor:
        """Apply the gradients times ``factor``. The host does not wait for the GPU.

        Args:
            factor: an fp32 scalar (:func:`gradient_factor`).
            unless: a boolean scalar. Where it is true, weights, moments and step counts stay as they are.

        Returns:
            The sum of squares of what was added to each parameter's part on this rank.
        """
        group, local = self._optimizer.param_groups[0], self._local
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        steps = [state["step"] for state in states]
        masters = [local(parameter) for parameter in self._parameters]
        factor = factor.to(masters[0].device)
        if unless is not None:
            unless = unless.to(factor.device)
            factor = torch.where(unless, torch.nan, factor)  # the op then changes nothing
        squares = self._op(
            [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None],
            masters,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            None,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=self._applied(steps[0]) + 1,
            factor=factor,
        )
        torch._foreach_add_(steps, torch.ones((), device=factor.device) if unless is None else (~unless).float())
        self._count = StepCount(steps[0])
        return squares

    def _applied(self, step: Tensor) -> int:
        """The updates that the state has seen. A checkpoint may have been read into it."""
        if self._count is None or not self._count.is_of(step):
            self._count = StepCount(step)
        return self._count.read()


class StepCount:
    """A step count on its way to the host. It is there when the next update asks for it, so that nothing waits.

    Args:
        step: the count, on any device.
    """

    def __init__(self, step: Tensor) -> None:
        self._step, self._version = step, step._version  # noqa: SLF001
        self._copy, self._ready = step, None
        if step.is_cuda:
            self._copy = torch.empty(step.shape, dtype=step.dtype, pin_memory=True).copy_(step, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def is_of(self, step: Tensor) -> bool:
        """Whether ``step`` is the same tensor, and nobody has written it since."""
        return step is self._step and step._version == self._version  # noqa: SLF001

    def read(self) -> int:
        """The count. Waits for the update that came before."""
        if self._ready:
            self._ready.synchronize()
        return int(self._copy)


@torch.no_grad()
def last_update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    local: Callable[[Tensor], Tensor],
    out: Sequence[Tensor],
) -> None:
    """What the last update took from each parameter: its values before less its values now.

    The fused AdamW does not hand this out, but its state still tells: lr · m̂ / (√v̂ + eps) + lr · wd · w, with the
    moments after the update, their bias corrected, and the weights w before it. Those are what they are now, plus the
    update itself; the formula is solved for that. The learning rate must still be that of the update. The host does not
    wait for the device.

    Args:
        optimizer: AdamW, after an update that was applied.
        parameters: some of its parameters.
        local: gives this rank's part of a parameter or of a moment.
        out: receives this rank's parts.
    """
    group = optimizer.param_groups[0]
    states = [optimizer.state[parameter] for parameter in parameters]
    taken, updates = list(out), states[0]["step"].double()
    bias_1, bias_2 = (1 - beta**updates for beta in group["betas"])
    decay = group["lr"] * group["weight_decay"]
    torch._foreach_copy_(taken, [local(state["exp_avg_sq"]) for state in states])
    torch._foreach_sqrt_(taken)
    torch._foreach_add_(taken, (group["eps"] * bias_2.sqrt()).float())
    torch._foreach_reciprocal_(taken)
    torch._foreach_mul_(taken, [local(state["exp_avg"]) for state in states])
    torch._foreach_mul_(taken, (group["lr"] * bias_2.sqrt() / bias_1 / (1 - decay)).float())
    if decay:
        torch._foreach_add_(taken, [local(parameter) for parameter in parameters], alpha=decay / (1 - decay))


def readback(optimizer: torch.optim.Optimizer) -> OptimizerFields:
    """The values that the live optimizer uses, under the names of telemetry. They may differ from the configuration."""
    group = optimizer.param_groups[0]
    return {
        "lr": float(group["lr"]),
        "betas": [float(beta) for beta in group["betas"]],
        "weight_decay": float(group["weight_decay"]),
        "clip_norm": float(group["clip_norm"]),
    }
