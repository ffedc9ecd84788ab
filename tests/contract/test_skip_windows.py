"""Which batch each update trains on, where windows are skipped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.contract.skip_windows import next_sample, parse_skip_window
from opt_ops.core.schedule import batch_of
from opt_ops.core.values import Skip


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


def test_the_words_of_the_command_line_are_parsed_or_explained() -> None:
    assert parse_skip_window("301:360") == (301, 360)
    for text in ("5", "0:5", "6:5", "5:6.5", ""):
        with pytest.raises(ValueError, match="expected FIRST:LAST"):
            parse_skip_window(text)
