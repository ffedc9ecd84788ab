"""Waits by the wall clock, and pauses between tries."""

from __future__ import annotations

import pytest

from opt_ops.core.waiting import Backoff, Retries, still_waiting


@pytest.mark.parametrize(
    ("now", "waits"), [(100.0, True), (109.9, True), (110.0, False), (41.0, True), (39.0, False), (-3500.0, False)]
)
def test_a_clock_that_is_set_back_far_ends_a_wait(now: float, waits: bool):
    assert still_waiting(now, 100.0, 10.0) is waits


def test_pauses_grow_to_their_limit():
    backoff = Backoff(first=2.0, factor=2.0, most=16.0)
    assert [backoff.pause(failures) for failures in (0, 1, 2, 3, 4, 5, 5000)] == [0.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]
    assert {Backoff(first=30.0).pause(failures) for failures in (1, 2, 5000)} == {30.0}


def test_each_name_has_its_own_pause_and_a_success_ends_it():
    retries = Retries(Backoff(first=10.0, factor=2.0))
    assert retries.due("a", 0.0)
    assert (retries.tried("a", 0.0), retries.due("a", 9.0), retries.due("a", 10.0)) == (1, False, True)
    assert (retries.tried("a", 10.0), retries.due("a", 29.0), retries.due("a", 30.0)) == (2, False, True)
    assert retries.due("b", 11.0)
    retries.succeeded("a")
    assert retries.due("a", 11.0)
    assert retries.tried("a", 11.0) == 1
