"""How long a rank works in a step, without its waits for other ranks. This shows which rank is slow."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from trainer.parallel.mesh import Layout


class GpuEvent(Protocol):
    """A mark in the queue of a GPU."""

    def record(self) -> None:
        """Put the mark into the queue."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds until the GPU reached ``end_event``. It must have passed both marks."""
        ...


class LayerTimes:
    """The time of the layers' forward passes on a GPU, without the gathering of weights between them.

    The time of a layer begins when its weights are there. These hooks are registered after those of FSDP2, so they run
    after FSDP2 made the GPU wait for the weights. Nothing here waits for the GPU. A call in one step returns the time
    of the step before. The GPU has passed the marks of that step, because the all-reduce at its end waited for them.
    """

    def __init__(self, layers: Iterable[nn.Module], event: Callable[[], GpuEvent]) -> None:
        self._event = event
        self._now: list[list[GpuEvent]] = []
        self._before: list[list[GpuEvent]] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def seconds(self) -> float | None:
        """Seconds of the step before. None in the first step."""
        done, self._before, self._now = self._before, self._now, []
        return sum(begin.elapsed_time(end) for begin, end in done) / 1000 if done else None

    def restart(self) -> None:
        """Forget a step that was broken off."""
        self._now, self._before = [], []

    def _begin(self, *_: object) -> None:
        if torch.is_grad_enabled():  # not in an evaluation
            self._now.append([self._event()])
            self._now[-1][0].record()

    def _end(self, *_: object) -> None:
        if torch.is_grad_enabled():
            self._now[-1].append(self._event())
            self._now[-1][1].record()


class CpuTime:
    """The CPU time of this thread. It does not count waits inside gloo, or a save that is written in the background."""

    def __init__(self) -> None:
        self._worked = time.thread_time()

    def seconds(self) -> float | None:
        """Seconds since the last call."""
        before, self._worked = self._worked, time.thread_time()
        return self._worked - before

    def restart(self) -> None:
        """Count from now on."""
        self._worked = time.thread_time()


def clock(layout: Layout, layers: Iterable[nn.Module]) -> LayerTimes | CpuTime | None:
    """What measures the work of this rank. None, on all ranks, if there is one rank or nothing can measure it.

    Args:
        layout: for the device and the number of ranks.
        layers: of the sharded model; none where hooks would break up compiled layers.
    """
    if layout.world == 1:
        return None
    if layout.device.type == "cpu":
        return CpuTime()
    layers = list(layers)
    return LayerTimes(layers, lambda: torch.cuda.Event(enable_timing=True)) if layers else None
