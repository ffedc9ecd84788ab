from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.schedule import batch_of
from opt_ops.core.values import Skip
from trainer.data import Samples, next_sample, part, permuted
from trainer.errors import UserError


@given(size=st.integers(1, 600), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_every_block_comes_exactly_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


@given(
    blocks=st.integers(1, 40),
    batch=st.integers(1, 30),
    parts=st.integers(1, 8),
    step=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_the_parts_of_all_ranks_are_the_batch_of_one(blocks: int, batch: int, parts: int, step: int, seed: int) -> None:
    samples = Samples(np.arange(blocks * 5, dtype=np.uint16), seq_len=4, seed=seed)
    whole, targets = samples.batch(step * batch, batch)
    shares = [part(step * batch, batch, parts, index) for index in range(parts)]
    slices = [samples.batch(first, count) for first, count in shares if count]
    assert torch.equal(torch.cat([inputs for inputs, _ in slices]), whole)
    assert torch.equal(torch.cat([targets for _, targets in slices]), targets)
    counts = [count for _, count in shares]
    assert max(counts) - min(counts) <= 1


def expected(step: int, skips: list[tuple[int, int]]) -> int:
    """The batch that the supervisor, by a formula of its own, expects update ``step`` to train on."""
    return batch_of(step, [Skip(first=first, last=last) for first, last in skips])


@given(
    batch=st.integers(1, 5),
    windows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10)), max_size=6),
)
def test_each_update_trains_on_the_next_batch_that_is_not_left_out(batch: int, windows: list[tuple[int, int]]) -> None:
    skips = [(first, first + more) for first, more in windows]
    left_out = {number for first, last in skips for number in range(first, last + 1)}
    kept = [number for number in range(1, 120) if number not in left_out][:40]
    position = 0
    for step, number in enumerate(kept, start=1):
        begin = next_sample(position, batch, skips)
        assert begin == (number - 1) * batch
        assert number == expected(step, skips)
        position = begin + batch


@given(
    batch=st.integers(1, 5),
    rollbacks=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 40), st.integers(0, 6)), max_size=6),
)
def test_after_rollbacks_that_leave_data_out_the_supervisor_still_knows_the_batch(
    batch: int, rollbacks: list[tuple[int, int, int]]
) -> None:
    positions, skips = [0], []  # the first by step, as its checkpoint holds it
    for updates, back_to, leave_out in rollbacks:
        for step in range(len(positions), len(positions) + updates):
            positions.append(next_sample(positions[-1], batch, skips) + batch)
            assert positions[step] == expected(step, skips) * batch
        del positions[back_to + 1 :]
        first = expected(len(positions), skips)
        if leave_out:
            skips.append((first, first + leave_out - 1))


@pytest.mark.parametrize(
    ("position", "skips", "begin"),
    [
        (80, [(5, 6)], 80),  # void: those were trained on, and nothing else is left out in their place
        (80, [(9, 12)], 96),  # what of it lies ahead
        (80, [(11, 11)], 88),
        (80, [(12, 12)], 80),
        (84, [(12, 12)], 96),  # between two batches: half of the next one lies in the window
        (84, [(11, 11)], 88),
    ],
)
def test_of_a_window_only_what_lies_ahead_is_left_out(position: int, skips: list[tuple[int, int]], begin: int) -> None:
    assert next_sample(position, 8, skips) == begin


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = Samples(np.arange(100, 200, dtype=np.uint16), seq_len=9, seed=1).batch(0, 10)
    assert inputs.shape == targets.shape == (10, 9)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert sorted(inputs[:, 0].tolist()) == list(range(100, 200, 10))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        (seed, epoch): tuple(permuted(i, 50, seed, epoch) for i in range(50)) for seed in range(4) for epoch in range(4)
    }
    assert len(set(orders.values())) == 16


def test_the_order_looks_shuffled() -> None:
    size = 1000
    order = [permuted(i, size, 1, 0) for i in range(size)]
    assert sum(i == block for i, block in enumerate(order)) < 8, "about one element stays in place"
    follows = sum(b == a + 1 for a, b in pairwise(order))
    assert follows < 8, "about one pair stays together"
    quarters = Counter((i * 4 // size, block * 4 // size) for i, block in enumerate(order))
    assert min(quarters.values()) > 30, "63 are expected to go from each quarter to each"


def test_the_order_is_the_one_it_always_was() -> None:
    # A golden value: runs that are under way would see some data twice and some never.
    assert [permuted(i, 10, 1, 0) for i in range(10)] == [3, 2, 5, 1, 8, 9, 6, 4, 7, 0]


def test_less_than_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="the data has 8 tokens, less than one sample of 9"):
        Samples(np.zeros(8, dtype=np.uint16), seq_len=8, seed=1)
