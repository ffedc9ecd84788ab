"""A score that is worse by more than three standard errors is told once, and nothing follows from it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.decide.scores import STANDARD_ERRORS, better, falls
from opt_ops.core.values import Severity
from tests.core.story import POLICY, Story, evaluated


def story() -> Story:
    return Story(dataclasses.replace(POLICY, least_alert=Severity.WARNING)).training(450)


def warned(events: list[e.Event]) -> list[e.AlertIntended]:
    found = [event for event in events if isinstance(event, e.AlertIntended)]
    assert len(found) == len(events), "an alert, never an action"
    return found


def test_a_fall_is_a_warning_with_both_values_and_is_told_once():
    told = story()
    assert warned(told.evaluated(100, value=0.60)) == []
    (warning,) = warned(told.evaluated(200, value=0.55))
    assert warning.severity is Severity.WARNING
    assert "a score is worse at step 200: hellaswag acc_norm" in warning.title
    assert "0.6 ± 0.01 at step 100 of 12.00, 0.55 ± 0.01 at step 200 of 12.00" in warning.body
    assert "worse by 3.5 standard errors" in warning.body
    assert "Nothing was touched." in warning.body
    assert warned(told.see(seconds=60)) == []
    assert warned(told.evaluated(300, value=0.54)) == [], "one standard error is chance"
    assert len(warned(told.evaluated(400, value=0.40))) == 1, "another pair"


def test_who_wants_to_hear_of_pages_only_is_not_told():
    told = Story(dataclasses.replace(POLICY, least_alert=Severity.PAGE)).training(450)
    told.evaluated(100, value=0.60)
    assert warned(told.evaluated(200, value=0.10)) == []


def test_of_perplexity_a_rise_is_worse():
    told = story()
    told.evaluated(100, metric="perplexity", value=10.0, stderr=0.1)
    assert warned(told.evaluated(200, metric="perplexity", value=9.0, stderr=0.1)) == []
    assert len(warned(told.evaluated(300, metric="perplexity", value=9.5, stderr=0.1))) == 1


def test_of_a_metric_that_is_not_known_nothing_is_told():
    told = story()
    told.evaluated(100, metric="pct_stereotype", value=0.9)
    assert warned(told.evaluated(200, metric="pct_stereotype", value=0.1)) == []
    assert better("acc,none") == 1


@pytest.mark.parametrize(
    "other", [{"shots": 5}, {"harness": "lm-eval 0.5.0"}, {"task_version": "2.0"}, {"task": "piqa"}, {"metric": "acc"}]
)
def test_what_was_measured_in_another_way_is_not_compared(other: dict[str, object]):
    told = story()
    told.evaluated(100, value=0.60)
    assert warned(told.evaluated(200, value=0.10, **other)) == []


def test_an_error_that_is_not_known_is_no_ground():
    told = story()
    told.evaluated(100, value=0.60, stderr=None)
    assert warned(told.evaluated(200, value=0.10)) == []


def test_all_right_and_then_all_wrong_is_a_fall_without_any_error():
    told = story()
    told.evaluated(100, value=1.0, stderr=0.0)
    (warning,) = warned(told.evaluated(200, value=0.0, stderr=0.0))
    assert "both standard errors are 0" in warning.body
    assert "inf" not in warning.body


def test_a_result_out_of_step_order_is_not_told():
    told = story()
    told.evaluated(100, value=0.60)
    told.evaluated(300, value=0.60)
    assert warned(told.evaluated(200, value=0.10)) == [], "the steps behind it were better: it is known"
    assert warned(told.evaluated(400, value=0.60)) == [], "compared with step 300"


def test_a_step_that_a_rollback_took_back_is_not_compared():
    told = story()
    told.evaluated(100, value=0.60)
    told.evaluated(400, value=0.60)
    told.spike(450, 150)
    told.ends()
    assert told.state.run is not None
    assert told.state.run.checkpoint is not None
    told.train(told.state.run.checkpoint.step + 60)
    assert told.state.run.name == "12.01"
    below = told.state.run.checkpoint.step + 50
    assert below < 400, "the step of 0.60 was taken back"
    found = [x for x in told.evaluated(below, value=0.10) if isinstance(x, e.AlertIntended)]
    assert ["at step 100 of 12.00" in each.body for each in found] == [True]


@given(
    values=st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1), st.floats(0.001, 0.2)), max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_falls_are_of_rising_steps_and_large_enough(values: list[tuple[int, float, float]], order):
    scores = [evaluated("12.00", step, value=value, stderr=error) for step, value, error in values]
    order.shuffle(scores)
    found = list(falls(scores))
    for fall in found:
        assert fall.before.step < fall.after.step
        difference = fall.before.value - fall.after.value
        assert difference > STANDARD_ERRORS * math.hypot(fall.before.stderr or 0, fall.after.stderr or 0)
    pairs = [(fall.before.step, fall.after.step) for fall in found]
    assert len(set(pairs)) == len(pairs)
    assert list(falls(scores[: len(scores) // 2])) == found[: len(list(falls(scores[: len(scores) // 2])))], (
        "what was told stays told"
    )
