"""What operators requested and were notified of: halts with their alerts and answers, by their order in the journal."""

from __future__ import annotations

from chronicles.operators import halts, notified_at
from chronicles.record import load
from opt_ops.core import events as e
from opt_ops.core.names import AlertTopic, alert_id
from opt_ops.core.values import Action, Severity
from tests.chronicles.told import Told


def alerted(told: Told, alert: str, delivered: bool = True) -> None:
    told.see(e.AlertIntended(alert=alert, severity=Severity.PAGE, title="t", body="b"))
    told.see(e.AlertSettled(alert=alert, delivered=delivered, why="" if delivered else "HTTP 503"))


def halted(told: Told) -> str:
    incident = told.incident("user_error", "no such recipe", "12.00-a0", 50)
    told.decide(incident, Action.HALT)
    told.see(e.LineageHalted(why="no such recipe", incident=incident))
    return incident


def test_a_halt_has_the_alert_and_the_answer_that_follow_it(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    first = halted(told)
    alerted(told, "12/halted/1.000")  # whatever time its id has
    told.see(e.ResumeRequested(request="r", author="ann", reason="fixed"), seconds=3600)
    second = halted(told)
    record = load(told.folder)
    one, two = halts(record)
    answer = next(entry for entry in record.entries if isinstance(entry.event, e.ResumeRequested))
    assert (one.incident, one.alert, one.answered_by, one.answered_seq) == (first, "12/halted/1.000", "ann", answer.seq)
    assert (two.incident, two.answered, two.answered_seq) == (second, None, None)
    assert two.alert == alert_id("12", AlertTopic.HALTED, two.at), "none was sent: the id that it would have"
    assert notified_at(record)[first] is not None
    assert notified_at(record)[second] is None


def test_an_alert_that_was_not_delivered_notified_nobody(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    incident = told.incident("hang", "no step", "12.00-a0", 50)
    told.decide(incident, Action.RESTART)
    alerted(told, alert_id(incident, AlertTopic.OPENED), delivered=False)
    assert notified_at(load(told.folder)) == {incident: None}
