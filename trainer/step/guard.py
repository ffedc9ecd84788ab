"""Which updates are applied: not one that overflowed, nor a lone one whose loss and gradients are both out of band."""

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
from trainer.telemetry import Measured

Reason = Literal["overflow", "out_of_band"]


class Guard:
    """Decides of each update whether it is applied, from what all ranks measured alike: all come to the same.

    An update is out of band when its loss and its gradient norm both lie further above the mean of the last updates
    than so many standard deviations. OLMo-core's ``SkipStepOptimizer`` (6 deviations, 128 updates) skips when one of
    the two does; on llm.c's public 19,560-step curve of a healthy run that skips 70 updates, both together 2. Two in a
    row are never skipped: what comes again is no freak batch, and whoever watches the loss has to see it.

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
        """What the next update's loss is multiplied by; None unless in fp16."""
        return self._scale.scale if self._scale else None

    def why_skip(self, measured: Measured) -> Reason | None:
        """Why this update must not be applied, or None; takes it in. To be asked once for each finite update."""
        reason: Reason | None = None
        if measured.overflow:
            reason = "overflow"
        elif not self._skipped_last and self._out_of_band(measured):
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

    def stuck(self) -> LossScaleError | None:
        """What ends training when the loss scale is at its floor and goes on to overflow: it would be a silent loop."""
        if not self._scale or self._scale.at_floor < self._scaling.patience:
            return None
        return LossScaleError(
            f"loss scale {self._scale.scale:g} is at its floor, and the gradients of the last {self._scale.at_floor} "
            "updates have overflowed: nothing is learned any more. Go back to a checkpoint from before, with a lower "
            "learning rate, or train in bf16."
        )

    def state(self) -> dict[str, Any]:
        """As JSON, for checkpoints."""
        return {
            "skipped": self.skipped,
            "skipped_last": self._skipped_last,
            "losses": list(self._losses),
            "gnorms": list(self._gnorms),
            "loss_scale": self._scale.state() if self._scale else None,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what :meth:`state` told; from a checkpoint without it, begin anew. The settings are today's."""
        if state is None:
            return
        self.skipped, self._skipped_last = state["skipped"], state["skipped_last"]
        self._losses.extend(state["losses"])
        self._gnorms.extend(state["gnorms"])
        if self._scale and state["loss_scale"]:
            self._scale = loss_scale.restored_scale(state["loss_scale"])

    def _out_of_band(self, measured: Measured) -> bool:
        if not self._band.deviations or len(self._losses) < self._band.warm:
            return False
        pairs = ((measured.loss, self._losses), (measured.gnorm, self._gnorms))
        return all(value > _limit(before, self._band.deviations) for value, before in pairs)


def _limit(values: deque[float], deviations: float) -> float:
    mean = statistics.fmean(values)
    return mean + deviations * statistics.stdev(values, mean)


def first_bad_module(model: nn.Module, run_again: Callable[[], object]) -> str:
    """Where numbers first cease to be finite in the batch that ``run_again`` puts through ``model`` once more.

    All ranks must call it. metaseq's ``NanDetector`` had the idea: hooks cost too much to be there always.

    Args:
        model: whose weights, outputs and gradients are looked at, in this order.
        run_again: does forward and backward pass, as in the update that went wrong.

    Returns:
        For example ``forward of layers.3.fc1 (rank 2)``, of the lowest rank that found the earliest kind of fault.
    """
    finds = _Finds()
    for name, parameter in model.named_parameters():
        finds.look(0, f"weight {name}", parameter)
    by_rank: list[dict[int, tuple[int, str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, finds.first)  # each looked at its own shards; running again takes all of them
    if not any(by_rank):
        with finds.hooks(model), torch.compiler.set_stance("force_eager"):  # a compiled layer has no modules to name
            run_again()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                finds.look(3, f"gradient of {name}", parameter.grad)
        dist.all_gather_object(by_rank, finds.first)
    told = [(kind, at, rank, name) for rank, first in enumerate(by_rank) for kind, (at, name) in first.items()]
    if not told:
        return "nowhere, when the batch was run again: a fault of the hardware?"
    _, _, rank, name = min(told)
    return f"{name} (rank {rank})"


class _Finds:
    """The first find of each kind: 0 weights, 1 outputs, 2 gradients of outputs, 3 gradients of weights.

    ``first`` says of each kind when it was, as the number of the look, and what; ranks look in the same order.
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
        """While this lasts, look at what every module inside ``model`` puts out, and at the gradients of that.

        A module's turn comes after that of those inside it, so that the innermost is named.
        """

        def look(name: str) -> Callable[..., None]:
            def forward(module: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, Tensor):
                    self.look(1, f"forward of {name}", output)
                    if output.requires_grad:
                        told = f"gradient of the output of {name}"
                        output.register_hook(lambda gradient: self.look(2, told, gradient))

            return forward

        handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
