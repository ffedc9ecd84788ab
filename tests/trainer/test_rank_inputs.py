"""What one rank hears or is slow with, all ranks know after the step's own reduction."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.signals import Signals
from tests.trainer.harness import Ranks
from tests.trainer.test_checkpoint import Training
from trainer.checkpoint.schedule import SaveSchedules
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import forward_backward, measure
from trainer.telemetry import _spread

EXTRA = 0.3


class Silence(Signals):
    """Signals of a rank that gets none. Here a rank is a thread, or has handlers of its own."""

    def __init__(self) -> None:
        self.save_requested = threading.Event()

    def dump_stacks_to(self, path: Path) -> None: ...


def inputs_of(training: Training, folder: Path) -> RankInputs:
    layout = training.layout
    outside = Outside(Options(run_dir=folder), layout.rank, Silence())
    return RankInputs(outside, layout, SaveSchedules(training.recipe, snapshots=False))


def one_rank_works_more(folder: Path, slow: int) -> list[Any]:
    training = Training(folder, 3, 1)
    inputs = inputs_of(training, folder)
    found = []
    for _ in range(3):
        shares = forward_backward(training.engine, training.samples, training.recipe, training.progress)
        if training.layout.rank == slow:
            until = time.thread_time() + EXTRA
            while time.thread_time() < until:
                pass
        found.append(measure(training.engine, shares, inputs.read(1)).busy_seconds)
    return found


@pytest.mark.parametrize("slow", [1, 2])
def test_the_slow_rank_is_named_and_those_that_wait_for_it_are_not(ranks: Ranks, tmp_path: Path, slow: int) -> None:
    outcomes = ranks(3, one_rank_works_more, tmp_path, slow)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for busy in outcomes[0][1:]:  # the first step has much to set up
        spread = _spread(busy)
        assert spread is not None
        assert spread["rank"] == slow
        assert spread["max"] >= EXTRA
        assert spread["median"] < EXTRA / 2, "waiting was taken for work"


def test_one_rank_waits_for_nobody(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1, alone, tmp_path) == [()]


def alone(folder: Path) -> tuple[float, ...]:
    training = Training(folder, 1, 1)
    inputs = inputs_of(training, folder)
    shares = forward_backward(training.engine, training.samples, training.recipe, training.progress)
    return tuple(measure(training.engine, shares, inputs.read(1)).busy_seconds)
