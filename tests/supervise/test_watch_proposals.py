"""The watch over proposals, in a daemon process that starts while one is open."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import Driver, ProposalStatus
from opt_ops.ports import Request
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.supervise.operator_requests import RequestWatch
from opt_ops.supervise.watch_proposals import ProposalWatch, with_due
from tests.core.story import Story, only


class Host:
    """The clocks of a host, since a proposal was made."""

    def __init__(self, made_at: float, boot: str = "b1") -> None:
        self.made_at, self.passed, self.set_by, self._boot = made_at, 0.0, 0.0, boot

    def now(self) -> float:
        return self.made_at + self.passed + self.set_by

    def monotonic(self) -> float:
        return 7.0 + self.passed

    def boot(self) -> str:
        return self._boot


def asked() -> tuple[Story, e.ProposalMade]:
    """A restart is proposed: it is done after two minutes."""
    story = Story().training(450)
    story.see(e.DriverChanged(request="r", author="ann", driver=Driver.ASK, reason=""))
    made = only(story.rank_dies(450), e.ProposalMade)
    assert made.deadline == story.now + 120.0
    return story, made


@pytest.mark.parametrize(
    ("set_by", "signed", "boot", "left"),
    [
        pytest.param(0.0, 40.0, "b1", 20.0, id="right clock"),
        pytest.param(-60.0, 40.0, "b1", 20.0, id="set back behind the last sign"),
        pytest.param(-90.0, 40.0, "b1", 20.0, id="set back before the last sign"),
        pytest.param(0.0, 40.0, "b2", 20.0, id="another host"),
        pytest.param(-59.0, 100.0, "b2", 20.0, id="another host, whose clock is a little behind"),
        pytest.param(-170.0, 100.0, "b2", 0.0, id="another host, set back"),
    ],
)
def test_a_deadline_comes_not_later_where_a_daemon_starts_on_a_clock_that_was_set_back(
    set_by: float, signed: float, boot: str, left: float
):
    story, made = asked()
    first = Host(story.now)
    incident = story.state.incidents[made.incident]
    (proposal,) = incident.proposals
    made = with_due(made, first)
    proposals = (replace(proposal, made=made),)
    state = replace(story.state, incidents={incident.name: replace(incident, proposals=proposals)})
    host = Host(story.now, boot)
    host.passed, host.set_by = 100.0, set_by
    watch = ProposalWatch(SimpleNamespace(), host, story.now + signed)
    if left:
        assert list(watch.observe(state)) == []
        host.passed += left - 1.0
        assert list(watch.observe(state)) == []
        host.passed += 1.0
    (over,) = watch.observe(state)
    assert over.status is ProposalStatus.EXPIRED


@pytest.mark.parametrize(
    ("given", "read", "status"),
    [(119.0, 500.0, ProposalStatus.APPROVED), (121.0, 500.0, None), (121.0, 118.0, ProposalStatus.APPROVED)],
    ids=["in time, read late", "late", "in time, by a clock that is ahead"],
)
def test_an_answer_that_waited_in_the_inbox_holds_if_it_was_given_in_time(
    given: float, read: float, status: ProposalStatus | None, tmp_path: Path
):
    story, made = asked()
    inbox = FileInbox(tmp_path)
    arguments = {"proposal": made.proposal, "reason": ""}
    inbox.put(Request(request="r1", author="bo", verb="approve", arguments=arguments), story.now + given)
    (event,) = RequestWatch(inbox, lambda: story.now + read).observe(lambda: story.state)
    if status is not None:
        assert isinstance(event, e.ProposalAnswered)
        assert event.status is status
        return
    assert isinstance(event, e.RequestRefused)
    assert "this answer was given at" in event.why
    assert event.why.endswith("without an answer in time, it is done")
