"""Decide which updates are applied: none that overflowed, and no single one far out of the usual band."""

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.errors import LossScaleError
from trainer.recipes import Recipe
from trainer.step import loss_scale
from trainer.step.measured import Limits, StepMeasurements

SkipReason = Literal["overflow", "out_of_band"]

STATE_VERSION = 2  # 1: the loss scale multiplied the mean of the loss over a rank's tokens. 2: it multiplies the sum.


class Guard:
    """Decides for each update whether it is applied. All ranks measured the same, so all decide the same.

    An update is out of band if its loss and its gradient norm are both far above their mean over the last updates. Far
    means more than ``guard.deviations`` standard deviations. OLMo-core's ``SkipStepOptimizer`` (6 deviations, 128
    updates) skips if one of the two is. On llm.c's public curve of a healthy run of 19,560 steps that skips 70 updates.
    The rule here skips 2. Two updates in a row are never skipped. A fault that repeats is not a single bad batch, and
    the supervisor must see it.

    Args:
        recipe: for precision, loss scale and guard.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._scaling, self._band = recipe.loss_scale, recipe.guard
        self._scale = loss_scale.first_scale(recipe.loss_scale) if recipe.precision == "fp16" else None
        self._losses: deque[float] = deque(maxlen=recipe.guard.window)
        self._gnorms: deque[float] = deque(maxlen=recipe.guard.window)
        self._skipped_last = False
        self.skipped = 0

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next update is multiplied by. None unless the precision is fp16."""
        return self._scale.scale if self._scale else None

    def skip_reason(self, measured: StepMeasurements) -> SkipReason | None:
        """Why this update must be skipped, or None. Records the update, so call it once for each finite update."""
        reason: SkipReason | None = None
        if measured.overflow:
            reason = "overflow"
        elif (limits := self.limits()) and measured.loss > limits.loss and measured.gnorm > limits.gnorm:
            reason = "out_of_band"
        if self._scale:
            self._scale = self._scale.after(overflow=measured.overflow, config=self._scaling)
        if reason:
            self.skipped += 1
        else:
            self._losses.append(measured.loss)
            self._gnorms.append(measured.gnorm)
        self._skipped_last = reason == "out_of_band"
        return reason

    def limits(self) -> Limits | None:
        """Above which loss and gradient norm the next update is out of band. None if it cannot be."""
        if self._skipped_last or not self._band.deviations or len(self._losses) < self._band.warm:
            return None
        return Limits(_limit(self._losses, self._band.deviations), _limit(self._gnorms, self._band.deviations))

    def loss_scale_error(self) -> LossScaleError | None:
        """The error that ends training if the loss scale is at its floor and updates still overflow.

        Without it, training would skip all further updates and learn nothing.
        """
        if not self._scale or self._scale.at_floor < self._scaling.patience:
            return None
        return LossScaleError(
            f"loss scale {self._scale.scale:g} is at its floor, and the gradients of the last {self._scale.at_floor} "
            "updates have overflowed: the model learns nothing any more. Go back to an earlier checkpoint with a lower "
            "learning rate, or train in bf16."
        )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""
        return {
            "v": STATE_VERSION,
            "skipped": self.skipped,
            "skipped_last": self._skipped_last,
            "losses": list(self._losses),
            "gnorms": list(self._gnorms),
            "loss_scale": self._scale.state() if self._scale else None,
        }

    def restore(self, state: Mapping[str, Any] | None) -> str | None:
        """Continue from what :meth:`state` returned. With None, from an older checkpoint, start without history.

        The settings are those of the recipe, not those of the checkpoint.

        Returns:
            A line for the log, if the loss scale begins again because that of the checkpoint meant something else.
        """
        if state is None:
            return None
        self.skipped, self._skipped_last = state["skipped"], state["skipped_last"]
        self._losses.clear()  # a guard that has been in use goes back to a step before
        self._gnorms.clear()
        self._losses.extend(state["losses"])
        self._gnorms.extend(state["gnorms"])
        if not self._scale or not state["loss_scale"]:
            return None
        if state.get("v", 1) < STATE_VERSION:
            return (
                f"note: the loss scale begins at {self._scale.scale:g} again: that of the checkpoint, "
                f"{state['loss_scale']['scale']:g}, is of an older version, which scaled the mean of the loss"
            )
        self._scale = loss_scale.restored_scale(state["loss_scale"])
        return None


def _limit(values: deque[float], deviations: float) -> float:
    mean = statistics.fmean(values)
    return mean + deviations * statistics.stdev(values, mean)


def first_bad_module(
    model: nn.Module,
    run_again: Callable[[], object],
    group: dist.ProcessGroup | None = None,
    *,
    exact: bool = True,
) -> str:
    """Find where numbers first stop being finite, by running the batch again.

    All ranks must call it. The idea is that of metaseq's ``NanDetector``. Hooks that stay in place would cost too much.

    Args:
        model: its weights, outputs and gradients are searched, in this order.
        run_again: runs forward and backward pass as in the update that failed.
        group: of all ranks, for what the host exchanges (default: the default group).
        exact: whether the same batch gives the same bits again: on CPUs, and with ``deterministic=true``.

    Returns:
        For example ``forward of layers.3.fc1 (rank 2)``. It is the earliest kind of fault, on the lowest rank that
        found it.
    """
    finds = _Finds()
    for name, parameter in model.named_parameters():
        finds.look(0, f"weight {name}", parameter)
    by_rank: list[dict[int, tuple[int, str]]] = [{} for _ in range(dist.get_world_size())]
    # Each rank searched its own shards, but all must run the batch again.
    dist.all_gather_object(by_rank, finds.first, group=group)
    if not any(by_rank):
        with finds.hooks(model), torch.compiler.set_stance("force_eager"):  # a compiled layer has no modules to name
            run_again()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                finds.look(3, f"gradient of {name}", parameter.grad)
        dist.all_gather_object(by_rank, finds.first, group=group)
    found = [(kind, at, rank, name) for rank, first in enumerate(by_rank) for kind, (at, name) in first.items()]
    if not found:
        if exact:
            return "nowhere when the batch was run again: the cause may be a hardware fault"
        return "did not come again when the batch was run again: hardware or rounding (deterministic=true would tell)"
    _, _, rank, name = min(found)
    return f"{name} (rank {rank})"


class _Finds:
    """The first find of each kind: 0 weights, 1 outputs, 2 gradients of outputs, 3 gradients of weights.

    Attributes:
        first: by kind, the number of the look that found it, and a name. All ranks look in the same order.
    """

    def __init__(self) -> None:
        self.first: dict[int, tuple[int, str]] = {}
        self._looks = 0

    def look(self, kind: int, name: str, tensor: Tensor) -> None:
        self._looks += 1
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if kind not in self.first and local.is_floating_point() and not torch.isfinite(local.detach()).all():
            self.first[kind] = self._looks, name

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, search the output of every module inside ``model``, and the gradient of that output.

        The hook of a module runs after those of the modules inside it, so the innermost one is named.
        """

        def look(name: str) -> Callable[..., None]:
            def forward(module: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, Tensor):
                    self.look(1, f"forward of {name}", output)
                    if output.requires_grad:
                        label = f"gradient of the output of {name}"
                        output.register_hook(lambda gradient: self.look(2, label, gradient))

            return forward

        handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
