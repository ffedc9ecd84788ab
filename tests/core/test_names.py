"""Ids of alerts: built and read in one place."""

from __future__ import annotations

import pytest

from opt_ops.core.names import AlertTopic, alert_id, parse_alert_id


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("12-i003", AlertTopic.OPENED), "12-i003/opened"),
        (("12", AlertTopic.HALTED, 1795.5), "12/halted/1795.500"),
        (("12", "COMPLETED"), "12/COMPLETED"),
        (("12", "loss_spike/alert/12.00-a0/160"), "12/loss_spike/alert/12.00-a0/160"),
    ],
)
def test_an_id_is_read_as_it_was_built(parts: tuple[str, str], text: str):
    assert alert_id(*parts) == text
    subject, topic, since = parse_alert_id(text)
    assert (subject, topic) == parts[:2]
    assert since == ("1795.500" if len(parts) > 2 else "")


@pytest.mark.parametrize("text", ["", "x", "12/", "12/halted/", "12/halted/soon", "/", "12/halted"])
def test_a_text_that_is_no_id_is_read_without_a_time(text: str):
    assert parse_alert_id(text).since == ""
