"""Who may be dead × every command that prints a state: no cell shows a living status without a mark.

The run folder is made by the real supervisor in a simulated world, and the clock is fixed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opt_ops.cli import build
from opt_ops.cli.shared import options
from opt_ops.core.state.status import Status
from opt_ops.errors import OptOpsError
from opt_ops.laboratory.replay.write_runfolder import write_telemetry
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.world import EPOCH, Planned
from opt_ops.runfolder.files import read_json, write_json
from opt_ops.runfolder.journal import Journal
from tests.commands import opt_ops
from tests.e2e.site import Site, until
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync

GOLDEN = Path(__file__).parent / "golden" / "who-is-dead.txt"
BEGAN, SILENT = 6000.0, 48.0
"""Seconds of simulated training, and for how long something has been dead since."""

DEAD = ("nobody", "daemon", "ranks", "daemon and ranks", "agents", "fenced daemon that lives", "controller")
COMMANDS = (
    ("q",),
    ("run", "list"),
    ("run", "show", "1"),
    ("run", "show", "1", "--check"),
    ("run", "watch", "1", "--once"),
    ("daemon", "status"),
    ("node", "list", "1"),
    ("logbook", "handover", "1"),
)
WHOLE = (("q",), ("run", "show", "1", "--check"), ("daemon", "status"), ("node", "list", "1"))
"""Of the others, the golden file holds the line with the status."""
LIVING = re.compile(
    r"\b(TRAINING|STARTING|QUEUED|PREFLIGHT|RECOVERING|ROLLING_BACK)\b(?!\?|, as of)|\bhealthy\b(?!\?| yes)|\trunning\t"
)
"""`healthy yes`: an event of the past, about a checkpoint."""


class Folder:
    """A site with lineage 1, whose files say what they would say 48 seconds after something died."""

    def __init__(self, folder: Path, dead: str) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "opt-ops.toml").write_text("[mlflow]\nenabled = false\n")
        plan = [Planned(at=0.0, fault=start())]
        if dead == "controller":
            plan.append(Planned(at=BEGAN, fault=faults.SchedulerAway(seconds=10_000.0)))
        lineage = SimulatedLineage(self.runs / "1", plan, physics(100_000))
        state = lineage.drive(until=BEGAN + SILENT)
        assert state.status is Status.TRAINING
        lineage.end()
        self.now = EPOCH + BEGAN + SILENT
        write_telemetry(self.runs / "1", lineage.world)
        telemetry = next(iter(sorted((self.runs / "1").rglob("telemetry.jsonl"))))
        self.steps(telemetry, self.now - (SILENT if "ranks" in dead else 1.0))
        (self.runs / "1" / "health").mkdir()
        for node in state.held:
            self.heartbeat(node, self.now - (SILENT if dead == "agents" else 1.0))
        signed = self.now - (SILENT if dead.startswith("daemon") else 1.0)
        fenced = dead.startswith("fenced")
        self.sign(signed, *(() if fenced else ("1",)), fenced=["1"] if fenced else [])

    def steps(self, path: Path, last: float) -> None:
        """The trainer made a step every half second until then."""
        lines = [json.loads(line) for line in path.read_text().splitlines()][-50:]
        for number, line in enumerate(reversed(lines)):
            line["ts"] = last - 0.5 * number
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def heartbeat(self, node: str, at: float) -> None:
        path = self.runs / "1" / "health" / f"{node}.jsonl"
        path.write_text(json.dumps({"ts": at, "node": node, "host": node, "nvml": "ok"}) + "\n")
        os.utime(path, (at, at))

    def sign(self, ts: float, *lineages: str, fenced: list[str]) -> None:
        sign = {"ts": ts, "host": "head", "pid": 7, "version": "1", "policy": "p", "lineages": list(lineages)}
        write_json(self.runs / "daemon.json", sign | {"fenced": fenced})

    def run(self, *arguments: str) -> tuple[int, str]:
        """A command, in this process: exit code, and what it printed."""
        code, stdout, stderr = run_in(self.folder, self.now, *arguments)
        return code, (stdout + stderr).replace(str(self.folder), "SITE")


def run_in(folder: Path, now: float, *arguments: str) -> tuple[int, str, str]:
    """A command, in this process, with a fixed clock: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(options.settings, "config_path", None)
        patch.setattr(time, "time", lambda: now)
        done = CliRunner().invoke(build(), arguments)
    if isinstance(done.exception, OptOpsError):
        return done.exception.exit_code, done.stdout, f"{done.stderr}{done.exception}; {done.exception.hint}\n"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folder]:
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        return {dead: Folder(tmp_path_factory.mktemp("dead"), dead) for dead in DEAD}


def test_what_every_command_says_is_known(sites: dict[str, Folder]):
    told: list[str] = []
    for dead in DEAD:
        for command in COMMANDS:
            code, said = sites[dead].run(*command)
            if command not in WHOLE:
                said = next(line for line in said.splitlines() if "TRAINING" in line).split(".** ")[0]
            told.append(f"=== dead: {dead} · opt-ops {' '.join(command)} · exit code {code}\n{said.rstrip()}\n")
    text = "\n".join(told)
    if not GOLDEN.exists():
        GOLDEN.write_text(text)
        pytest.fail(f"{GOLDEN} was written; look at it and run again")
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("dead", DEAD[1:])
def test_no_living_status_without_a_mark(sites: dict[str, Folder], dead: str, command: tuple[str, ...]):
    code, said = sites[dead].run(*command)
    if command == ("node", "list", "1") and dead in ("ranks", "controller"):
        return  # the nodes do live, and are heard
    if command == ("daemon", "status"):
        assert code == (75 if dead.startswith("daemon") else 5 if dead.startswith("fenced") else 0), said
        return
    assert not LIVING.search(said.split(" NEWEST ")[0]), said  # what follows is history
    if command[-1] == "--check":
        assert code == 5


def test_nothing_is_marked_where_nobody_is_dead(sites: dict[str, Folder]):
    for command in COMMANDS:
        code, said = sites["nobody"].run(*command)
        assert (code, "?" in said) == (0, False), said


@pytest.mark.parametrize("dead", DEAD)
def test_programs_are_told_too(sites: dict[str, Folder], dead: str):
    _, said = sites[dead].run("q", "-o", "json")
    (row,) = json.loads(said)["items"]
    found = {each["finding"] for each in row["findings"]}
    expected = {
        "nobody": set[str](),
        "daemon": {"unwatched"},
        "ranks": {"stale"},
        "daemon and ranks": {"unwatched", "stale"},
        "agents": {"silent"},
        "fenced daemon that lives": {"fenced"},
        "controller": {"scheduler"},
    }[dead]
    assert (row["state"], row["shown"], found) == ("TRAINING", "TRAINING?" if expected else "TRAINING", expected)
    assert row["watched"] is not ("unwatched" in expected or "fenced" in expected)
    assert row["step_age_seconds"] == (SILENT if "ranks" in dead else 1.0)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def said_by(site: Site, *arguments: str) -> tuple[int, str]:
    done = opt_ops(site.folder, *arguments)
    return done.returncode, done.stdout + done.stderr


def test_a_daemon_that_is_killed_or_stopped_is_told_at_once_on_its_host(site: Site):
    site.start("steps=100000", "pause=0.05")
    daemon = site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    until(lambda: said_by(site, "daemon", "status")[0] == 0)
    until(lambda: "TRAINING\t" in said_by(site, "q")[1])
    assert said_by(site, "run", "show", "1", "--check")[0] == 0
    site.kill_daemon()
    code, said = said_by(site, "daemon", "status")
    assert (code, "yes" in said, f"pid {daemon.pid} on" in said) == (75, False, True), said
    assert "TRAINING?" in said_by(site, "q")[1]
    assert "has died" in said_by(site, "q")[1]
    assert said_by(site, "run", "show", "1", "--check")[0] == 5
    code, said = said_by(site, "run", "note", "1", "good night")
    assert (code, "nobody watches since" in said, "next: opt-ops daemon ensure" in said) == (0, True, True), said
    assert "has not accepted the request yet" not in said, "a note waits for no daemon that is dead"
    daemon = site.start_daemon()
    until(lambda: said_by(site, "daemon", "status")[0] == 0)
    until(lambda: "TRAINING\t" in said_by(site, "q")[1])
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(240)
    assert read_json(site.runs / "daemon.json")["left_at"]
    code, said = said_by(site, "daemon", "status")
    assert (code, "was stopped" in said) == (75, True), said
    assert "TRAINING?" in said_by(site, "q")[1]


def test_a_daemon_that_is_fenced_says_so_and_is_no_watch(site: Site):
    site.start("steps=100000", "pause=0.05")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    until(lambda: said_by(site, "daemon", "status")[0] == 0)
    other = Journal(site.runs / "1" / "journal")  # a daemon of another host that takes over, and does nothing more
    until(lambda: read_json(site.runs / "daemon.json")["fenced"] == ["1"])
    code, said = said_by(site, "daemon", "status", "-o", "json")
    (row,) = json.loads(said[: said.rindex("}") + 1])["items"]
    assert (code, row["alive"], row["lineages"], row["fenced"]) == (5, True, [], ["1"])
    assert "TRAINING?" in said_by(site, "q")[1]
    assert "fenced" in said_by(site, "run", "show", "1", "--check")[1]
    other.close()


LISTS = (("q",), ("run", "list"), ("node", "list"), ("node", "ledger", "--all"), ("ledger",))


@pytest.mark.parametrize("damaged", ["1", "2", "3"])
@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_one_damaged_lineage_costs_one_row(sites: dict[str, Folder], tmp_path: Path, damaged: str, command: Any):
    for name in ("1", "2", "3"):
        shutil.copytree(sites["nobody"].runs / "1", tmp_path / "runs" / name)
    file = next((tmp_path / "runs" / damaged / "journal").glob("*.jsonl"))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b'{"half": ', *lines[3:]]))
    code, stdout, stderr = run_in(tmp_path, sites["nobody"].now, *command, "-o", "json")
    assert (code, f"Lineage {damaged} cannot be read" in stderr) == (5, True), stderr
    rows = json.loads(stdout)["items"]
    unreadable = [row for row in rows if "UNREADABLE" in (row.get("state"), row.get("verdict"))]
    assert [row["lineage"] for row in unreadable] == [damaged]
    assert "000001.jsonl, line" in next(str(row.get("reason") or row.get("last")) for row in unreadable)
    assert len(rows) - len(unreadable) >= (2 if command in (("q",), ("run", "list"), ("ledger",)) else 1)
    assert run_in(tmp_path, sites["nobody"].now, *command)[0] == 5


def test_a_folder_without_a_configuration_is_named(tmp_path: Path):
    for arguments, code in ((("q",), 3), (("daemon", "ensure"), 2)):
        found, _, said = run_in(tmp_path, 1.0, *arguments)
        assert (found, str(tmp_path) in said, "-c" in said) == (code, True, True), said
    assert not (tmp_path / "runs").exists()
