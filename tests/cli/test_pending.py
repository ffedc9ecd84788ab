"""`opt-ops pending` and the commands that answer, on a journal that no daemon watches."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import AskDefault, AskTerms, Driver
from tests.commands import opt_ops
from tests.core.story import Story


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Lineage 12 waits for an answer about a rollback."""
    asked(tmp_path, time.time())
    return tmp_path


def asked(site: Path, began: float) -> None:
    story = Story()
    story.now = began
    story.training(460)
    terms = AskTerms(default=AskDefault.WAIT, seconds=1800.0)
    story.see(e.DriverChanged(request="r1", author="ann", driver=Driver.ASK, reason="", ask=terms))
    story.spike(460, onset=410)
    story.save(site / "runs" / "12")


def test_what_waits_is_listed_with_exit_code_5(site: Path):
    done = opt_ops(site, "pending", "-o", "json")
    assert done.returncode == 5
    answer = json.loads(done.stdout)
    assert answer["schema"] == "opt-ops/proposals/1"
    (row,) = answer["items"]
    fields = ("proposal", "incident", "action", "default", "status", "by", "reason", "at")
    expected = ["12-i000-p1", "12-i000", "rollback", "wait", "open", None, None, None]
    assert [row[each] for each in fields] == expected
    waited = datetime.fromisoformat(row["deadline"]) - datetime.fromisoformat(row["made"])
    assert waited.total_seconds() == pytest.approx(1800, abs=1)
    assert row["text"].startswith("would ")
    assert "step 300" in row["text"]
    assert row["why"]
    assert row["evidence"]
    assert row["cost"]["steps"] == 160
    people = opt_ops(site, "pending", "12")
    assert people.returncode == 5
    assert "it is not done" in people.stdout
    assert "opt-ops run approve 12-i000-p1" in people.stderr


def test_other_commands_say_that_a_proposal_waits(site: Path):
    assert "12-i000-p1 needs an answer by" in opt_ops(site, "q").stdout
    assert json.loads(opt_ops(site, "q", "-o", "json").stdout)["items"][0]["proposals"] == ["12-i000-p1"]
    assert "It waits for an answer until" in opt_ops(site, "explain", "12-i000").stdout
    assert "12-i000-p1" in opt_ops(site, "logbook", "handover", "12").stdout
    assert "It waits for an answer until" in opt_ops(site, "why", "12").stdout


def test_an_answer_is_queued_for_the_next_daemon(site: Path):
    done = opt_ops(site, "run", "decline", "12-i000", "--reason", "known", "--author", "bo")
    assert done.returncode == 0, done.stderr
    (path,) = (site / "runs/12/inbox").glob("*.json")
    request = json.loads(path.read_text())
    assert (request["verb"], request["author"]) == ("decline", "bo")
    assert request["arguments"] == {"proposal": "12-i000-p1", "reason": "known"}


def test_an_answer_behind_the_deadline_is_refused(tmp_path: Path):
    asked(tmp_path, time.time() - 3600)
    for verb in ("approve", "decline"):
        done = opt_ops(tmp_path, "run", verb, "12-i000")
        assert done.returncode == 4, done.stderr
        assert "the deadline of 12-i000-p1 was" in done.stderr
        assert "without an answer in time, it is not done" in done.stderr
    assert not list((tmp_path / "runs/12/inbox").glob("*.json"))


def test_what_is_done_instead_is_asked_for_behind_the_answer(site: Path):
    done = opt_ops(site, "run", "decline", "12-i000", "--instead", "rollback --to 200 --lr-scale 0.5")
    assert done.returncode == 0, done.stderr
    requests = [json.loads(path.read_text()) for path in sorted((site / "runs/12/inbox").glob("*.json"))]
    assert {each["verb"] for each in requests} == {"decline", "change"}
    (change,) = (each["arguments"] for each in requests if each["verb"] == "change")
    assert (change["to_step"], change["lr_factor"]) == (200, 0.5)
    first, last = sorted(requests, key=lambda each: each["ts"])
    assert (first["verb"], last["verb"]) == ("decline", "change")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["approve", "12-i009"], 4, "12-i009 is no proposal that waits; open now: 12-i000-p1"),
        (["approve", "12"], 4, "open now: 12-i000-p1"),
        (["decline", "12-i000", "--instead", "dance"], 2, "not one of rollback, set, pause, stop"),
        (["decline", "12-i000", "--instead", 'rollback "--to'], 2, "No closing quotation"),
        (["decline", "12-i000", "--instead", "rollback --too 5"], 2, "opt-ops: No such option: --too"),
        (["decline", "12-i000", "--instead", "rollback --to 5"], 4, "no verified healthy checkpoint"),
        (["ask", "12", "--only", "halt", "--yes"], 4, "'halt' is not asked about"),
        (["ask", "12", "--deadline", "soon", "--yes"], 2, "--deadline soon"),
        (["ask", "12", "--deadline", "30d", "--yes"], 4, "at most 7 days"),
    ],
    ids=[
        "another",
        "lineage",
        "instead of what",
        "half a quotation",
        "no option",
        "no checkpoint",
        "halt",
        "no span",
        "too long",
    ],
)
def test_a_wrong_answer_is_refused_and_nothing_is_asked_for(site: Path, arguments: list[str], code: int, said: str):
    done = opt_ops(site, "run", *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert not list((site / "runs/12/inbox").glob("*.json"))


def test_a_dry_run_says_what_would_follow(site: Path):
    approved = opt_ops(site, "run", "approve", "12-i000", "--dry-run").stdout
    assert "12.01" in approved
    assert "step 300" in approved
    assert approved.splitlines()[-1] == "would lose    160 steps behind that checkpoint"
    assert not (site / "runs/12/inbox").exists() or not list((site / "runs/12/inbox").iterdir())
