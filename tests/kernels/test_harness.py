"""The harness itself: each fault that it is there for is put into a small kernel, and found."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.harness import error, guarded, interpreted, last_program, same_in_any_order, sparse
from trainer.kernels.jit import constexpr, jit, tl

ROWS = torch.linspace(0.1, 1.7, 500).view(5, 100)


@jit
def _double(source, result, width, BLOCK: constexpr, WIDE: constexpr, MASKED: constexpr, READS: constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(source + row * width + columns, columns < (BLOCK if READS else width))
    tl.store(result + row * width + columns, 2 * value, columns < (width if MASKED else BLOCK))


@jit
def _sum(source, result, width, BLOCK: constexpr, ATOMIC: constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(source + tl.program_id(0) * width + columns, inside)
    if ATOMIC:
        tl.atomic_add(result + columns, value, inside)
    else:  # right where programs run one after another
        tl.store(result + columns, tl.load(result + columns, inside) + value, inside)


@jit
def _total(source, result, width, BLOCK: constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(result, tl.sum(tl.load(source + columns, columns < width), 0))


@jit
def _ticket(counter, result):
    tl.store(result + tl.program_id(0), tl.atomic_add(counter, 1))


def double(
    source: Tensor, wide: bool = True, masked: bool = True, reads: bool = False, rows: int | None = None
) -> Tensor:
    result = torch.empty_like(source)
    _run(_double, len(source) if rows is None else rows, source, result, source.shape[1], 128, wide, masked, reads)
    return result


def _run(kernel: Any, programs: int, *args: Any) -> None:
    kernel[(programs,)](*args)


@interpreted
def test_a_right_kernel_passes() -> None:
    with guarded() as copied:
        assert error(double(copied(ROWS)), 2 * ROWS) == 0
    same_in_any_order(lambda: [double(ROWS)])


@interpreted
def test_a_store_past_the_end_is_found() -> None:
    with pytest.raises(AssertionError, match="28 elements after a tensor of 100"), guarded() as copied:
        double(copied(ROWS[:1]), masked=False)


@interpreted
def test_a_read_past_the_end_is_found() -> None:
    with pytest.raises(Exception, match="28 reads beyond a tensor of 100"), guarded() as copied:
        double(copied(ROWS[:1]), reads=True)


@interpreted
def test_what_is_not_written_shows() -> None:
    with guarded():
        assert error(double(ROWS, rows=4), 2 * ROWS) == float("inf")


@interpreted
def test_what_a_mask_leaves_out_is_not_zero() -> None:
    result = torch.zeros(1)
    _run(_total, 1, ROWS[0], result, 100, 128)
    assert result.isnan()


@interpreted
def test_a_sum_without_atomics_is_a_race() -> None:
    with pytest.raises(AssertionError, match="_sum: 400 addresses are written by more than one program"):
        _run(_sum, 5, ROWS, torch.zeros(100), 100, 128, False)


@interpreted
def test_rows_that_reach_into_their_neighbours_are_a_race() -> None:
    with pytest.raises(AssertionError, match="_double: 112 addresses"), guarded() as copied:
        double(copied(ROWS), masked=False)


@interpreted
def test_a_sum_by_atomics_is_refused() -> None:
    with pytest.raises(Exception, match="atomic operation on floats"):
        _run(_sum, 5, ROWS, torch.zeros(100), 100, 128, True)


@interpreted
def test_an_order_that_matters_is_found() -> None:
    def run() -> list[Tensor]:
        counter, result = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        _run(_ticket, 8, counter, result)
        return [result]

    with pytest.raises(AssertionError, match=r"\['reversed 0', 'shuffled 1', 'shuffled 2'\]"):
        same_in_any_order(run)


@interpreted
def last_of_many(wide: bool) -> None:
    source = sparse((2**31 // 100 + 2, 100), torch.float16)
    source[-1] = torch.arange(100)
    with last_program():
        result = double(source, wide)
    assert torch.equal(result[-1], 2 * source[-1])


def test_the_last_program_alone_runs_beyond_two_to_the_31() -> None:
    last_of_many(wide=True)


def test_a_child_that_dies_is_one_failed_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="died"):
        last_of_many(wide=False)
    last_of_many(wide=True)


@interpreted
def skipped() -> None:
    pytest.skip("because")


def test_a_test_may_skip_itself() -> None:
    with pytest.raises(pytest.skip.Exception, match="because"):
        skipped()
