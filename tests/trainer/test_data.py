from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import Samples, part, permuted
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
