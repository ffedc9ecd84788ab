"""The watch over proposals, in a daemon process that starts while one is open."""

from types import SimpleNamespace

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import Driver, ProposalStatus
from opt_ops.supervise.watch_proposals import ProposalWatch
from tests.core.story import Story, only


@pytest.mark.parametrize(("set_back", "signed"), [(0.0, 40.0), (60.0, 100.0)])
def test_what_passed_before_the_last_sign_is_not_waited_for_again(set_back: float, signed: float):
    story = Story().training(450)
    story.see(e.DriverChanged(request="r", author="ann", driver=Driver.ASK, reason=""))
    made = only(story.rank_dies(450), e.ProposalMade)
    assert made.deadline == story.now + 120.0
    monotonic = [7.0]
    clock = SimpleNamespace(now=lambda: story.now + 100.0 - set_back, monotonic=lambda: monotonic[0])
    watch = ProposalWatch(SimpleNamespace(), clock, story.now + signed)
    assert list(watch.observe(story.state)) == []
    monotonic[0] += 19.0
    assert list(watch.observe(story.state)) == []
    monotonic[0] += 1.0
    (over,) = watch.observe(story.state)
    assert over.status is ProposalStatus.EXPIRED
