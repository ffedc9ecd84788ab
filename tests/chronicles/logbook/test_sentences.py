"""Sentences of the evidence: who asked, what NVIDIA advises, how many nodes were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import front_page
from chronicles.record import load
from chronicles.report.build import build
from chronicles.wording import evidence
from opt_ops.cli.run.explain_lines import explanation_lines
from opt_ops.core import events as e
from opt_ops.core.values import AllocationStatus
from tests.chronicles.eventful import eventful
from tests.chronicles.told import Told


def test_a_request_has_an_author_and_a_reason_and_no_rung(tmp_path: Path):
    report = build(load(eventful(tmp_path / "12").folder))
    asked = next(row for row in report.incidents if row.requested and row.kind == "operator")
    assert asked.cause_in_words.startswith("asked for by ann: “the bend at 440")
    lines = "\n".join(explanation_lines(asked))
    assert "cause     asked for by ann: “" in lines
    assert "rung" not in lines
    assert any(branch.cause == asked.cause_in_words for branch in front_page(report, None).tree)
    sick = next(row for row in report.incidents if row.kind == "bad_gpu")
    assert sick.cause == "n2: xid_79", "report.json keeps the code"
    assert sick.cause_in_words == "n2: a GPU has fallen off the bus (Xid 79)"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"xid": 79, "verb": "REBOOT_NODE", "table": "2026-11-22"},
            "Xid 79; NVIDIA's advice for Xid 79: reboot the node",
        ),
        ({"xid": 79, "verb": "ISOLATE"}, "Xid 79; advice of the health table: keep the node out until it is examined"),
        ({"expected": 8, "verb": "NONE"}, "GPUs expected 8"),
    ],
)
def test_the_advice_of_the_health_table_is_a_sentence(fields: dict[str, object], words: str):
    assert evidence(fields) == (words, "")


def test_a_request_that_was_withdrawn_does_not_count_beside_its_successor(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 50)
    why = "0 of 3 nodes are held, 0 are asked for"
    for name, nodes in (("12-n1", 3), ("12-n2", 2), ("12-n3", 1)):
        told.see(e.AllocationIntended(allocation=name, nodes=nodes, exclude=(), why=why))
        told.see(e.AllocationSubmitted(allocation=name, job=f"9{nodes}", adopted=False))
        if name == "12-n1":
            gone = AllocationStatus.ENDED
            told.see(e.AllocationChanged(allocation=name, status=gone, nodes=(), reason="CANCELLED"))
    record = load(told.folder)
    (asked,) = [entry for entry in entries(record, build(record)) if "requested" in entry.title]
    assert asked.title == "requested 3 nodes in 3 jobs"
    assert [fact.text for fact in asked.facts] == ["3 nodes requested, as jobs 93, 92, 91."]
