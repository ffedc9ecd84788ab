"""How long a rank works on a step while nobody keeps it waiting: what tells the slow from those that wait for it."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from trainer.parallel.mesh import Layout


class Event(Protocol):
    """A mark in the queue of a GPU."""

    def record(self) -> None:
        """Put it there."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds until the later one. Both must have been passed."""
        ...


class LayerTimes:
    """The time of the layers' forward passes on a GPU, without the gathering of weights between them.

    A layer begins when its weights are there: these hooks are registered after FSDP2's, and so run after it has made
    the GPU wait for them. Nothing here waits for the GPU: asked in one step, it tells of the step before, whose events
    the reduction at that step's end has waited for.
    """

    def __init__(self, layers: Iterable[nn.Module], event: Callable[[], Event]) -> None:
        self._event = event
        self._now: list[list[Event]] = []
        self._before: list[list[Event]] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def seconds(self) -> float | None:
        """Of the step before; None in the first one."""
        done, self._before, self._now = self._before, self._now, []
        return sum(begin.elapsed_time(end) for begin, end in done) / 1000 if done else None

    def _begin(self, *_: object) -> None:
        if torch.is_grad_enabled():  # an evaluation is no step
            self._now.append([self._event()])
            self._now[-1][0].record()

    def _end(self, *_: object) -> None:
        if torch.is_grad_enabled():
            self._now[-1].append(self._event())
            self._now[-1][1].record()


class CpuTime:
    """CPU time of this thread: what gloo waits for, or a save writes in the background, is not in it."""

    def __init__(self) -> None:
        self._worked = time.thread_time()

    def seconds(self) -> float | None:
        """Since this was last asked."""
        before, self._worked = self._worked, time.thread_time()
        return self._worked - before


def clock(layout: Layout, layers: Iterable[nn.Module]) -> LayerTimes | CpuTime | None:
    """What measures this rank's work; None, on all ranks, where nobody waits for another or nothing tells it apart.

    Args:
        layout: for the device and the number of ranks.
        layers: of the model, sharded; none where hooks would disturb, as in compiled layers.
    """
    if layout.world == 1:
        return None
    if layout.device.type == "cpu":
        return CpuTime()
    layers = list(layers)
    return LayerTimes(layers, lambda: torch.cuda.Event(enable_timing=True)) if layers else None
