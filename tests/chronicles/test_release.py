"""The model card and the statements of a release, from a journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from chronicles.record import load
from chronicles.release import statement
from chronicles.release.card import Released, card, is_name
from chronicles.report.build import build
from opt_ops.config import Rates
from opt_ops.core.failures.classes import title
from tests.chronicles.eventful import eventful
from tests.chronicles.record import LINEAGE

RELEASED = Released(name="mine", run="12.02", step=200, dtype="fp16", licence="apache-2.0", digest="d" * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eventful(tmp_path_factory.mktemp("runs") / "12").folder


def test_the_card_tells_what_went_wrong_what_was_changed_and_what_is_not_known(folder: Path):
    record = load(folder)
    report = build(record, Rates(gpu_tdp_watts=400, kg_co2e_per_kwh=0.4, factor_source="a table"))
    text = card(record, report, RELEASED)
    for incident in report.incidents:
        assert title(incident.kind) in text
    for run in report.runs:
        assert f"| {run.run} |" in text
    assert "run 12.02 at step 200, in fp16" in text
    assert "400 W" in text
    assert "(a table)" in text
    unknown = text[text.index("## What is not known") :]
    assert "not evaluated" in unknown
    assert "Energy was not metered." in unknown


def test_a_card_of_a_lineage_in_which_nothing_happened_says_so(told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    record = load(told.folder)
    text = card(record, build(record), RELEASED)
    assert "Nothing is in the journal." in text
    assert "| Tokens | 61,440 trained on up to step 60 |" in text, "telemetry counts them from the beginning"
    assert "were never changed" in text
    assert "No carbon figure" in text


def test_the_card_has_what_was_measured_on_this_very_checkpoint(told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    told.evaluated(50, digest="d" * 64).evaluated(50, digest="d" * 64, task="a|b<i>", metric="acc", stderr=None)
    told.evaluated(40, value=0.123456)
    record = load(told.folder)
    text = card(record, build(record), RELEASED)
    row = "| hellaswag | acc_norm | 0.500 ± 0.01 | 10,042 | 0 | lm-eval 0.4.13, task version 1.0 | not known |"
    assert row in text
    assert "| a\\|b\\<i\\> | acc | 0.500 |" in text
    assert "0.123" not in text, "another checkpoint"
    unknown = text[text.index("## What is not known") :]
    assert "not evaluated" not in unknown
    assert "Bias and toxicity were not tested" in unknown
    told.evaluated(50, digest="d" * 64, task="crows_pairs_english", metric="pct_stereotype")
    record = load(told.folder)
    assert "Bias and toxicity" not in card(record, build(record), RELEASED)


def test_the_data_statement_has_no_path_and_counts_contamination():
    corpus = {
        "name": "wiki",
        "share": 1.0,
        "tokens": 5,
        "documents": 2,
        "digest": "sha256:1",
        "sources": ["/secret/wiki"],
    }
    dedup = {
        "source": "/secret/clean",
        "threshold": 0.95,
        "contaminated": {"/secret/tests.jsonl": 3},
        "inputs": ["/secret"],
    }
    told = statement.data({"data": {"corpora": [corpus], "dedup": [dedup], "tokens": 5}}, str.upper, 10)
    assert "secret" not in str(told)
    assert told["corpora"][0]["name"] == "WIKI"
    assert told["dedup"][0]["contaminated"] == 3
    assert not statement.data(None, str, 10)["known"]


def test_provenance_names_code_and_versions():
    told = statement.provenance(load(LINEAGE), run="1.01", step=600, checkpoint="c" * 64, journal="j" * 64)
    assert told["versions"]["torch"]
    assert (told["run"], told["checkpoint"]) == ("1.01", "sha256:" + "c" * 64)


def test_names_of_models_are_those_that_hubs_take():
    assert is_name("opt-175b_v1.0")
    assert not is_name("../x")
    assert not is_name("a b")
