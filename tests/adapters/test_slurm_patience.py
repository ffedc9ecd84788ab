"""A Slurm that takes its time holds nobody up, and is asked once. The real one is in tests/slurm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ops.adapters import slurm
from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler
from opt_ops.errors import NotYet, Refused


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Make a command of Slurm: it notes its call, waits for a file `answer`, and goes on as told; the notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.2)

    def make(name: str, then: str) -> Path:
        notes = tmp_path / f"{name}.calls"
        wait = f"echo called >> {notes}\nwhile [ ! -e {tmp_path}/answer ]; do sleep 0.05; done\n"
        (folder / name).write_text(f"#!/bin/sh\n{wait}{then}\n")
        (folder / name).chmod(0o755)
        return notes

    return make


def insist(ask: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return ask()
        except NotYet:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_submission_that_takes_long_is_one_submission(tmp_path: Path, command: Callable[[str, str], Path]):
    command("srun", "exit 0")
    calls = command("sbatch", "echo Submitted batch job 7")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    for _ in range(3):
        with pytest.raises(NotYet, match="sbatch has not answered"):
            scheduler.submit("1-n0", 2, ())
    (tmp_path / "answer").touch()
    assert insist(lambda: scheduler.submit("1-n0", 2, ())) == "7"
    assert calls.read_text() == "called\n"


def test_a_drain_that_is_refused_late_is_refused(tmp_path: Path, command: Callable[[str, str], Path]):
    calls = command("scontrol", "echo slurm_update error: Invalid user id >&2; exit 1")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    with pytest.raises(NotYet):
        scheduler.drain("n1", "opt-ops 1-i000: silent")
    (tmp_path / "answer").touch()
    with pytest.raises(Refused, match="not permitted to drain n1"):
        insist(lambda: scheduler.drain("n1", "opt-ops 1-i000: silent"))
    assert calls.read_text() == "called\n"
