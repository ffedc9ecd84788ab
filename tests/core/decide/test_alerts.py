"""Who is notified of what: one message when something is done, one when it is over, a page when a human is needed."""

import dataclasses

from opt_ops.core import events as e
from opt_ops.core.values import Fault, Outcome, Severity, Tier, Verdict
from tests.core.story import POLICY, Story, only


def story(least: Severity | None) -> Story:
    return Story(dataclasses.replace(POLICY, least_alert=least)).training(450)


def told(events: list[e.Event]) -> list[tuple[str, Severity]]:
    return [(event.alert, event.severity) for event in events if isinstance(event, e.AlertIntended)]


def test_nobody_is_told_where_nobody_is_named():
    assert told(story(None).rank_dies(450)) == []


def test_one_message_for_an_incident_and_one_for_its_end():
    told_of = story(Severity.INFO)
    decided = told_of.rank_dies(450)
    assert told(decided) == [("12-i000/opened", Severity.WARNING)]
    body = only(decided, e.AlertIntended).body
    assert "rank 1 on n2 was killed by signal 9" in body
    assert "action: restart (rank died, rung 2)" in body
    assert "opt-ops run explain 12" in body
    told_of.ends()
    assert told(told_of.train(410)) == [("12-i000/closed", Severity.INFO)]
    assert told(told_of.see(seconds=100)) == []


def test_what_is_less_severe_than_asked_for_is_not_told():
    assert told(story(Severity.PAGE).rank_dies(450)) == []


def test_a_drill_wakes_nobody():
    told_of = story(Severity.INFO)
    told_of.see(
        e.DrillRequested(
            request="r", author="ann", drill="d000", fault=Fault.KILL_RANK, attempt="12.00-a0", arguments={"rank": 1}
        )
    )
    assert told(told_of.rank_dies(450)) == [("12-i000/opened", Severity.INFO)]


def test_halted_is_a_page_that_says_what_was_tried():
    told_of = story(Severity.PAGE)
    decided = told_of.rank_dies(450, code=78)
    (page,) = [event for event in decided if isinstance(event, e.AlertIntended)]
    assert page.severity is Severity.PAGE
    assert "Tried:" in page.body
    assert ": stop and page a person, not over" in page.body
    assert "trying again would not help" in page.body
    assert "opt-ops run resume 12" in page.body


def test_an_alert_is_open_until_it_was_delivered_and_holds_the_lineage_open():
    told_of = story(Severity.PAGE)
    decided = told_of.rank_dies(450, code=78)
    page = only(decided, e.AlertIntended)
    told_of.ends(Outcome.FAILED)
    told_of.changed("12-n0", status=told_of.state.allocation.status.__class__.ENDED)
    assert not told_of.state.finished
    told_of.see(e.AlertSettled(alert=page.alert, delivered=True, why=""))
    assert told_of.state.finished


def test_an_alert_tier_finding_is_a_warning_once():
    told_of = story(Severity.WARNING)
    raised = e.SignalRaised(
        signal="gradient_norm", tier=Tier.ALERT, attempt="12.00-a0", step=450, onset_step=449, at=1.0, rule="rising"
    )
    assert told(told_of.see(raised)) == [("12/gradient_norm/alert/12.00-a0/449", Severity.WARNING)]
    assert told(told_of.see(raised)) == []


def test_a_bad_spare_is_told_without_a_restart():
    assert told(story(Severity.WARNING).judge("n3", Verdict.BAD, "xid_48")) == [("12-i000/opened", Severity.WARNING)]
