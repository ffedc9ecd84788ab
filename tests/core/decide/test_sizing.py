"""Save interval and spares, from what failed."""

import math

import pytest

from opt_ops.core import events as e
from opt_ops.core.decide.sizing import recommend
from opt_ops.core.values import Fault, Verdict
from tests.core.story import Story


def test_the_interval_is_youngs():
    story = Story().training(450)
    story.now += 86400.0
    story.rank_dies(450)
    story.ends()
    ran = story.state.attempts["12.00-a0"].ended_at - story.state.attempts["12.00-a0"].started_at
    advice = recommend(story.state, 2.0, 15.0, story.now)
    assert (advice.failures, advice.node_failures) == (1, 0)
    assert advice.running_seconds == pytest.approx(ran)
    assert advice.interval_seconds == pytest.approx(math.sqrt(2 * 2.0 * ran / 1.5))


def test_before_anything_ran_nothing_is_said():
    story = Story()
    story.begin()
    advice = recommend(story.state, 2.0, 15.0, story.now)
    assert (advice.interval_seconds, advice.spares) == (None, None)


def test_after_two_minutes_nothing_is_said_either():
    story = Story().training(450)
    advice = recommend(story.state, 2.0, 15.0, story.now)
    assert (advice.interval_seconds, advice.spares) == (None, None)


def test_drills_and_planned_moves_do_not_count():
    story = Story().training(450)
    story.see(
        e.DrillRequested(request="r", author="a", drill="d000", fault=Fault.XID, attempt="12.00-a0", arguments={})
    )
    story.judge("n3", Verdict.BAD, "xid_48", drill="d000")
    assert recommend(story.state, None, 15.0, story.now).failures == 0


def test_spares_cover_the_nodes_in_repair_in_99_of_100_cases():
    story = Story().training(450)
    story.judge("n3", Verdict.BAD, "xid_48")
    days = 10 * 86400.0
    started = story.state.attempts["12.00-a0"].started_at
    advice = recommend(story.state, None, 24.0, started + days)
    mean = 1.5 / 10
    below = [math.exp(-mean) * sum(mean**k / math.factorial(k) for k in range(n + 1)) for n in range(5)]
    assert below[advice.spares] >= 0.99 > below[advice.spares - 1]


def test_many_failures_need_no_digits_that_there_are_not():
    story = Story().training(450)
    story.judge("n3", Verdict.BAD, "xid_48")
    started = story.state.attempts["12.00-a0"].started_at
    advice = recommend(story.state, None, 1e6, started + 86400.0)
    assert advice.spares == pytest.approx(1.5e6 / 24, rel=0.02)
