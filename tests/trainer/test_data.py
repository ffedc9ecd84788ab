from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.contract.skip_windows import next_sample
from trainer.data.mixture import LONGEST, turns, whole_parts
from trainer.data.samples import Mixture, Samples, part, permuted
from trainer.errors import UserError


def order(size: int, seed: int, epoch: int) -> list[int]:
    return permuted(torch.arange(size), size, seed, epoch).tolist()


def corpus(lengths: list[int], seq_len: int, seed: int) -> Samples:
    """Documents of these lengths, of tokens that are numbered through."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return Samples(np.arange(bounds[-1], dtype=np.uint32), seq_len, seed, bounds)


# Shares of corpora, and how long their documents are; each corpus has a sample of five tokens at least.
PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
DOCUMENTS = st.lists(st.integers(1, 12), min_size=5, max_size=150)
no_hurry = settings(deadline=None, max_examples=50)  # the machine may be busy


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    parts = draw(PARTS)
    return [draw(DOCUMENTS) for _ in parts], parts, draw(st.integers(0, 2**40))


def build(recipe: tuple[list[list[int]], list[int], int]) -> Mixture:
    documents, parts, seed = recipe
    return Mixture([corpus(lengths, 4, seed + c) for c, lengths in enumerate(documents)], parts)


@given(size=st.integers(1, 600), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_every_block_comes_exactly_once_per_epoch(size: int, seed: int, epoch: int) -> None:
    assert sorted(order(size, seed, epoch)) == list(range(size))


@no_hurry
@given(lengths=DOCUMENTS, seed=st.integers(0, 1000), epoch=st.integers(0, 50))
def test_every_document_is_read_once_per_epoch(lengths: list[int], seed: int, epoch: int) -> None:
    samples = corpus(lengths, 4, seed)
    rows = samples.rows(np.arange(epoch * samples.blocks, (epoch + 1) * samples.blocks))
    times = Counter(rows.ravel().tolist())
    total = sum(lengths)
    assert set(times) == set(range(total))
    twice = samples.blocks * 5 - total
    assert sum(times.values()) - total == twice < 5, "what fills up the last sample is all that comes twice"
    # Within a document, tokens follow each other; it is cut at the ends of samples only.
    ends = set((np.cumsum(lengths) - 1).tolist())
    for row in rows.tolist():
        for token, following in pairwise(row):
            assert following == token + 1 or token in ends


def test_documents_come_in_another_order_in_each_epoch() -> None:
    samples = corpus([5] * 200, 4, 1)

    def epoch(number: int) -> list[int]:
        rows = samples.rows(np.arange(number * 200, (number + 1) * 200))
        return [row[0] // 5 for row in rows.tolist()]

    orders = [epoch(number) for number in range(4)]
    assert all(sorted(each) == list(range(200)) for each in orders)
    assert len({tuple(each) for each in orders}) == 4
    assert epoch(0) == orders[0], "an earlier epoch again"


def test_neighbours_in_the_file_meet_other_documents_in_each_epoch() -> None:
    # Two documents a sample: were only samples shuffled, the same two would meet in every epoch.
    samples = corpus([5] * 200, 9, 1)

    def pairs(number: int) -> set[frozenset[int]]:
        rows = samples.rows(np.arange(number * 100, (number + 1) * 100))
        return {frozenset((row[0] // 5, row[5] // 5)) for row in rows.tolist()}

    assert len(pairs(0) & pairs(1)) < 5


@no_hurry
@given(recipe=mixtures(), positions=st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_sample_is_a_function_of_its_position_alone(
    recipe: tuple[list[list[int]], list[int], int], positions: list[int]
) -> None:
    in_order, jumping = build(recipe), build(recipe)
    last = max(positions) + 1
    expected, _ = in_order.batch(0, last)
    for position in positions:
        assert torch.equal(jumping.batch(position, 1)[0][0], expected[position])


@no_hurry
@given(parts=PARTS, periods=st.integers(1, 3))
def test_each_corpus_has_its_share_within_one_sample_at_all_times(parts: list[int], periods: int) -> None:
    mixture = build(([[9]] * len(parts), parts, 1))
    count = periods * sum(parts) + 7
    had = Counter()
    for n, (chosen, index) in enumerate(zip(*mixture.corpus_of(np.arange(count)), strict=True), start=1):
        assert index == had[chosen], "the next one of its corpus"
        had[chosen] += 1
        for c, part_ in enumerate(parts):
            assert abs(had[c] - Fraction(n * part_, sum(parts))) < 1


def test_turns_stay_what_they_are() -> None:
    # A golden value, as that of the order below.
    assert "".join("abc"[c] for c in turns([5, 3, 2])) == "abacababac"


def test_weights_become_whole_parts() -> None:
    assert whole_parts([Fraction("0.35"), Fraction("0.65")]) == [7, 13]
    assert whole_parts([Fraction(2), Fraction(4)]) == [1, 2]
    assert whole_parts([Fraction("0.1")]) == [1]
    assert sum(whole_parts([Fraction(LONGEST - 1), Fraction(1)])) == LONGEST
    with pytest.raises(UserError, match="fewer digits"):
        whole_parts([Fraction("0.123457"), Fraction("0.876543")])


def test_a_mixture_of_one_is_the_corpus() -> None:
    alone = corpus([7, 30, 4, 9], 4, 3)
    assert torch.equal(build(([[7, 30, 4, 9]], [1], 3)).batch(5, 20)[0], alone.batch(5, 20)[0])


@no_hurry
@given(
    recipe=mixtures(),
    batch=st.integers(1, 30),
    parts=st.integers(1, 8),
    step=st.integers(0, 30),
)
def test_the_parts_of_all_ranks_are_the_batch_of_one(
    recipe: tuple[list[list[int]], list[int], int], batch: int, parts: int, step: int
) -> None:
    samples = build(recipe)
    whole, targets = samples.batch(step * batch, batch)
    shares = [part(step * batch, batch, parts, index) for index in range(parts)]
    slices = [build(recipe).batch(first, count) for first, count in shares if count]  # each rank has its own
    assert torch.equal(torch.cat([inputs for inputs, _ in slices]), whole)
    assert torch.equal(torch.cat([targets for _, targets in slices]), targets)
    counts = [count for _, count in shares]
    assert max(counts) - min(counts) <= 1


@no_hurry
@given(
    batch=st.integers(1, 5),
    windows=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), max_size=3),
)
def test_leaving_windows_out_changes_nothing_else_about_the_data(batch: int, windows: list[tuple[int, int]]) -> None:
    """The samples follow from the position alone, so it is enough that each position is that of the next batch kept."""
    skips = [(first, first + more) for first, more in windows]
    left_out = {number for first, last in skips for number in range(first, last + 1)}
    kept = [number for number in range(1, 44) if number not in left_out]
    position = 0
    for number in kept[:20]:
        position = next_sample(position, batch, skips)
        assert position == (number - 1) * batch
        position += batch


def test_targets_are_the_tokens_after_the_inputs() -> None:
    inputs, targets = Samples(np.arange(100, 200, dtype=np.uint16), seq_len=9, seed=1).batch(0, 10)
    assert inputs.shape == targets.shape == (10, 9)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert sorted(inputs[:, 0].tolist()) == list(range(100, 200, 10))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    assert len({tuple(order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_the_order_looks_shuffled() -> None:
    size = 1000
    shuffled = order(size, 1, 0)
    assert sum(i == block for i, block in enumerate(shuffled)) < 8, "about one element stays in place"
    follows = sum(b == a + 1 for a, b in pairwise(shuffled))
    assert follows < 8, "about one pair stays together"
    quarters = Counter((i * 4 // size, block * 4 // size) for i, block in enumerate(shuffled))
    assert min(quarters.values()) > 30, "63 are expected to go from each quarter to each"


def test_the_order_is_the_one_it_always_was() -> None:
    # Golden values: runs that are under way would see some data twice and some never.
    assert order(10, 1, 0) == [3, 2, 5, 1, 8, 9, 6, 4, 7, 0]
    samples = corpus([3, 9, 4, 1, 7, 2, 6, 8], 4, 1)
    assert samples.rows(np.arange(16))[:, 0].tolist() == [28, 21, 9, 25, 35, 12, 1, 4, 16, 13, 8, 30, 19, 3, 35, 24]


def test_less_than_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="the data has 8 tokens, less than one sample of 9"):
        Samples(np.zeros(8, dtype=np.uint16), seq_len=8, seed=1)
