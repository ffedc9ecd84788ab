"""Errors: what, why, what next; and the same for programs, on stderr."""

import json
from pathlib import Path

import pytest

from opt_ops.cli.shared.mistakes import for_programs
from opt_ops.core import events as e
from opt_ops.core.values import Outcome
from tests.commands import opt_ops
from tests.core.story import Story


@pytest.mark.parametrize(
    ("words", "code"),
    [(["q"], 3), ([], 3), (["explain"], 3), (["ledger"], 3), (["pending"], 3), (["daemon", "ensure"], 2)],
)
def test_a_folder_that_is_no_site(tmp_path: Path, words: list[str], code: int):
    done = opt_ops(tmp_path, *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == (
        f"opt-ops: no opt-ops.toml in {tmp_path} and $OPT_OPS_CONFIG is not set: "
        f"looked into {tmp_path}/runs, which is not there\n  next: opt-ops init, or opt-ops -c FILE\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["run", "show", "13", "-o", "json"], 3, "no lineage 13 in "),
        (["drill", "lr", "12", "--updates", "0", "-o", "jsonl"], 2, "--updates 0: at least 1"),
        (["events", "12", "--kind", "foo", "--output=json"], 2, "--kind foo: no such kind"),
        (["run", "fly", "-ojson"], 2, "No such command 'fly'."),
        (["node", "check", "--seconds", "12", "-o", "json"], 3, "--seconds 12: at least 20"),
        (["run", "stop", "12", "-o", "json"], 4, "not done without confirmation"),
    ],
)
def test_programs_get_an_error_as_json_on_stderr(tmp_path: Path, words: list[str], code: int, error: str):
    Story().training(100).save(tmp_path / "runs" / "12")
    done = opt_ops(tmp_path, *words)
    assert (done.returncode, done.stdout) == (code, "")
    told = json.loads(done.stderr)
    assert list(told) == ["schema", "error", "hint", "exit_code"]
    assert (told["schema"], told["exit_code"]) == ("opt-ops/error/1", code)
    assert told["error"].startswith(error)
    assert told["hint"]


def test_what_asks_for_json():
    assert for_programs(["q", "-o", "json"])
    assert for_programs(["q", "-ojsonl"])
    assert not for_programs(["q", "-o", "wide"])
    assert not for_programs(["run", "note", "12", "json"])
    assert not for_programs(["trainer", "check", "--", "python", "-o", "json"])
    assert not for_programs([])


def test_a_lineage_that_has_ended_has_nothing_to_pause(tmp_path: Path):
    story = Story().training(100)
    story.see(e.StopRequested(request="r", author="ann", reason="wrong tokenizer"))
    story.ends(Outcome.STOPPED)
    story.save(tmp_path / "runs" / "12")
    done = opt_ops(tmp_path, "run", "pause", "12")
    assert (done.returncode, done.stdout) == (4, "")
    assert "opt-ops: lineage 12 ended on 1 Jan (CANCELLED): nothing to pause\n" in done.stderr
    assert "next: opt-ops run fork 12, or opt-ops logbook open 12" in done.stderr
