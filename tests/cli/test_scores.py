"""`opt-ops ckpt scores`: the newest score of each thing that was measured, beside the settled one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opt_ops.cli import app
from tests.core.story import Story


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    story = Story().training(450)
    for step, value in ((100, 0.60), (200, 0.61), (300, 0.30)):
        story.evaluated(step, value=value)
    story.evaluated(100, task="pi\x1b[31mqa", metric="acc", stderr=None)
    story.save(tmp_path / "runs" / "12")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["ckpt", "scores", "12", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_newest_of_each_with_the_one_before(site: Path):
    answer = json.loads(printed("-o", "json"))
    assert answer["schema"] == "opt-ops/ckpt-scores/1"
    newest, other = answer["items"]
    assert (newest["step"], newest["value"], newest["fell"], newest["settled"]) == (300, 0.30, True, True)
    assert newest["previous"] == {"step": 200, "value": 0.61}
    assert (other["metric"], other["previous"], other["fell"]) == ("acc", None, False)
    assert [item["step"] for item in json.loads(printed("--all", "-o", "json"))["items"]] == [100, 200, 300, 100]


def test_as_a_table_nothing_is_obeyed(site: Path):
    table = printed()
    assert "\x1b" not in table
    assert table.splitlines()[1].split("\t") == [
        *("300", "12.00", "hellaswag", "acc_norm", "0.300 ± 0.01", "0.610 at 200", "yes", "yes", "10042", "-", "0"),
    ]


def test_of_a_lineage_without_evaluation_the_list_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Story().training(450).save(tmp_path / "runs" / "12")
    monkeypatch.chdir(tmp_path)
    assert json.loads(printed("-o", "json"))["items"] == []
    assert "next: opt-ops ckpt evaluate 12/STEP" in CliRunner().invoke(app, ["ckpt", "scores", "12"]).stderr
