"""The work of a rank, told from its waiting. No GPU was at hand: a clock of numbers stands for its events."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from trainer.step.busy_time import LayerTimes


class Mark:
    """An event that is passed at once, a millisecond after the one before."""

    ticks = itertools.count()

    def record(self) -> None:
        self.at = next(self.ticks)

    def elapsed_time(self, end_event: Mark) -> float:
        return end_event.at - self.at


def test_each_step_tells_of_the_one_before_and_evaluations_are_no_steps() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]
    times = LayerTimes(layers, Mark)

    def forward() -> None:
        x = torch.ones(1, 2)
        for layer in layers:
            x = layer(x)
            next(Mark.ticks)  # between layers the GPU waits for weights

    forward()
    forward()  # two micro-batches
    assert times.seconds() is None
    with torch.no_grad():
        forward()
    forward()
    assert times.seconds() == pytest.approx(6e-3)
    assert times.seconds() == pytest.approx(3e-3)
