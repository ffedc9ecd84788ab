"""Runs the command in this process, and a job in which nothing is real but the commands that are asked."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opt_ops.cli import build
from opt_ops.cli.run import watch_job as run_watch_job
from opt_ops.cli.shared.options import settings
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import lineages

CONTROLLER = """#!/bin/sh
echo "$(basename "$0") $*" >> {calls}
case "$(basename "$0") $1" in
  "scontrol show")
    [ -e {folder}/down ] && {{ echo "error: Unable to contact slurm controller" >&2; exit 1; }}
    [ -e {folder}/forgotten ] && {{ echo "error: Invalid job id specified" >&2; exit 1; }}
    cat {folder}/job ;;
  "sacct -n") cat {folder}/accounts ;;
  *) exit 9 ;;
esac
"""

JOB = """JobId=812 JobName=train JobState=FAILED of 812
   UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=a QOS=normal
   JobState={state} Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={exit}
   RunTime=00:00:10 TimeLimit=1-00:00:00 TimeMin=N/A
   NodeList=gpu[001-002]
   BatchHost=gpu001
   Command=/home/ann/train.sh StdOut=/etc/passwd
   WorkDir={folder}
   Comment=a word = no field

   Power=
   StdErr={log}
   StdIn=/dev/null
   StdOut={log}
"""


@dataclass
class Slurm:
    """Commands of Slurm that stand on the PATH, and note how they were called."""

    folder: Path
    log: Path
    calls: Path = field(init=False)

    def __post_init__(self) -> None:
        self.calls = self.folder / "calls"
        self.calls.touch()
        (self.folder / "bin").mkdir()
        (self.folder / "accounts").touch()
        for name in ("scontrol", "sacct", "squeue", "sinfo", "scancel", "sbatch", "srun"):
            file = self.folder / "bin" / name
            file.write_text(CONTROLLER.format(calls=self.calls, folder=self.folder))
            file.chmod(0o755)
        self.says("RUNNING")

    def says(self, state: str, exit_: str = "0:0") -> None:
        """What the controller says from now on."""
        text = JOB.format(state=state, exit=exit_, folder=self.folder, log=self.log)
        new = self.folder / "job.new"
        new.write_text(text)
        new.rename(self.folder / "job")

    @property
    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@dataclass
class Ran:
    """What a watch said, and what it left."""

    code: int
    findings: list[dict[str, Any]]
    stderr: str
    error: str
    lineage: Path

    @property
    def kinds(self) -> list[str]:
        return [each["kind"] for each in self.findings]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a configuration; the watch looks ten times as often."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "config_path", None)
    monkeypatch.setattr(run_watch_job, "_LOOK_SECONDS", 0.05)
    return tmp_path


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A controller that answers at once, and is asked often."""
    from opt_ops.watch_job import job_poll

    (folder / "slurm").mkdir()
    found = Slurm(folder / "slurm", folder / "slurm-812.out")
    monkeypatch.setenv("PATH", f"{found.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(job_poll, "POLL_SECONDS", 0.1)
    return found


def watch(*arguments: str) -> Ran:
    """Run `opt-ops run watch-job … -o jsonl` to its end."""
    umask = os.umask(0o022)
    try:
        result = CliRunner().invoke(build("run", "watch-job"), ["run", "watch-job", *arguments, "-o", "jsonl"])
    finally:
        os.umask(umask)
    error = result.exception
    if error is not None and not isinstance(error, SystemExit | OptOpsError):
        raise error
    code = error.exit_code if isinstance(error, OptOpsError) else result.exit_code
    known = lineages.folders(Path("runs").absolute())
    findings = [json.loads(line) for line in result.stdout.splitlines()]
    return Ran(code, findings, result.stderr, str(error or ""), known[-1] if known else Path())


def in_background(work: Callable[[], None]) -> threading.Thread:
    """Do something while the watch runs in the main thread, which takes signals."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(met: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def telemetry(ran: Ran, attempt: str = "a0") -> list[dict[str, Any]]:
    """The lines of telemetry that the watch wrote."""
    file = ran.lineage / f"{ran.lineage.name}.00" / attempt / "telemetry.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]
