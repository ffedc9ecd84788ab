"""Requests as people make them: what is confirmed how, and `--wait`, with a real daemon and real processes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.core.state.status import Status
from opt_ops.errors import Refused
from tests.cli.test_cli import told
from tests.e2e.site import Site


def test_waiting_ends_when_what_was_asked_for_is_reached(tmp_path: Path):
    site = Site(tmp_path)
    try:
        (tmp_path / "text.jsonl").write_text("{}\n")
        options = ["--set", "steps=100000", "--valid", "text.jsonl:50", "--wait"]
        unwatched = site.command("run", "start", "stub", *options, code=75)
        assert unwatched.startswith("1\n"), "the number is reported before it is waited for"
        assert "opt-ops daemon ensure" in unwatched
        site.start_daemon()
        site.wait(lambda state: state.status is Status.TRAINING)
        orders = json.loads((site.runs / "1" / "orders.json").read_text())
        argv = orders["launch"]["argv"]
        assert argv[argv.index("--valid") + 1] == f"{tmp_path}/text.jsonl:50"
        answer = json.loads(site.command("run", "pause", "1", "--yes", "--wait", "-o", "json"))
        assert answer["items"][0]["status"] == "done"
        assert site.state().status is Status.PAUSED
        site.command("run", "resume", "1", "--yes", "--wait")
        assert site.state().status is Status.TRAINING
        site.command("run", "rollback", "1", "--yes", "--wait")
        state = site.state()
        assert (state.run and state.run.name, state.status) == ("1.01", Status.TRAINING)
        site.command("drill", "kill-rank", "1", "--yes", "--wait")
        (incident,) = (each for each in site.state().incidents.values() if each.drill)
        assert (incident.drill, incident.proven) == ("d000", True)
        site.command("run", "stop", "1", "--yes", "--wait")
        stopped = site.state()
        assert (stopped.status, stopped.live_allocations) == (Status.CANCELLED, ())
        assert "(CANCELLED)" in site.command("run", "resume", "1", "--yes", "--wait", code=Refused.exit_code)
    finally:
        site.close()


def test_who_does_not_wait_is_told_at_once_that_it_waits(tmp_path: Path):
    site = Site(tmp_path)
    answer = json.loads(site.command("run", "start", "stub", "--no-wait", "-o", "json"))
    assert answer["items"][0]["status"] == "waiting"


def typed(folder: Path, keys: str, *arguments: str) -> tuple[int, str]:
    """A command on a terminal, and its exit code and stderr."""
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "opt_ops", *arguments]
    with subprocess.Popen(command, cwd=folder, stdin=its, stdout=its, stderr=subprocess.PIPE, text=True) as process:
        os.close(its)
        os.write(ours, keys.encode())
        said = process.stderr.read() if process.stderr else ""
        code = process.wait(240)
    os.close(ours)
    return code, said


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lineage 12 that no daemon watches."""
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


@pytest.mark.parametrize(
    ("keys", "command", "done"),
    [
        ("y\n", ["run", "pause", "12"], True),
        ("\n", ["run", "pause", "12"], False),
        ("12\n", ["run", "stop", "12.01"], True),
        ("y\n", ["run", "stop", "12"], False),
        ("\n", ["run", "stop", "12"], False),
    ],
)
def test_a_person_confirms_and_types_the_lineage_where_nothing_can_be_undone(
    lineage: Path, keys: str, command: list[str], done: bool
):
    inbox = lineage / "runs/12/inbox"
    before = set(inbox.glob("*.json"))
    code, said = typed(lineage, keys, *command)
    assert (code, len(set(inbox.glob("*.json")) - before)) == ((0, 1) if done else (Refused.exit_code, 0)), said
    assert ("Type 12 to go on" if "stop" in command else "[y/N]") in said
