"""A micro-batch and its clock travel to a GPU in one copy. On a CPU nothing is copied."""

from typing import Any

import torch

from tests.trainer.harness import Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer.step import copies
from trainer.step.batches import packed, put, unpacked
from trainer.step.measured import Progress
from trainer.step.step import forward_backward

ROWS = torch.arange(5 * 33).view(5, 33)
PARTS = (ROWS[:, :-1], ROWS[:, 1:], torch.tensor([2**62 + 1, -7, 3]))


def test_what_is_packed_comes_out_again_at_addresses_that_kernels_like() -> None:
    whole = packed(PARTS, pin=False).clone()  # as the copy on a GPU
    found = unpacked(whole, PARTS)
    assert all(map(torch.equal, found, PARTS))
    for each in found:
        assert each.is_contiguous()
        assert (each.data_ptr() - whole.data_ptr()) % 16 == 0


def test_on_a_cpu_nothing_is_copied() -> None:
    inputs, targets, now = put(PARTS[0], PARTS[1], [1, 2, 3], torch.device("cpu"))
    assert (inputs.data_ptr(), targets.data_ptr()) == (PARTS[0].data_ptr(), PARTS[1].data_ptr())
    assert now.tolist() == [1, 2, 3]


def clocks() -> tuple[list[list[int]], int]:
    """What the dropouts of each micro-batch read, and how many tensors the clock made itself."""
    recipe = build(1, 1, "data.global_batch=8", "data.micro_batch=2", "model.dropout=0.1")
    engine, data = engine_of(recipe), samples(recipe)
    clock, read, made = engine.model.clock, [], []
    kind: Any = type(clock)
    tensor = kind._tensor
    kind._tensor = lambda self, device: made.append(device) or tensor(self, device)
    engine.model.layers[0].register_forward_hook(lambda *_: read.append(clock.now(torch.device("cpu")).tolist()))
    try:
        forward_backward(engine, data, recipe, Progress(step=3, data_position=40))
    finally:
        kind._tensor = tensor
    clock.step, clock.first_sample = 9, 77  # as in an evaluation or a test: the next pass reads these
    clock.start(torch.device("cpu"))
    return [*read, clock.now(torch.device("cpu")).tolist()], len(made)


def test_each_micro_batch_reads_the_clock_that_came_with_it(ranks: Ranks) -> None:
    ((read, made),) = ranks(1, clocks)
    assert [values[1] for values in read] == [40, 42, 44, 46, 77]
    assert len({values[0] for values in read[:4]}) == 1
    assert read[4][0] != read[3][0]
    assert made == 0, "the clock made a copy of its own"


def test_the_host_reads_its_own_memory_at_once() -> None:
    values = torch.tensor([1.0, 2.0])
    assert copies.to_device(values, torch.device("cpu")) is values
    assert copies.to_host(values)() == [1.0, 2.0]
