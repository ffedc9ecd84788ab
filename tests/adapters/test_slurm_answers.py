"""A slow Slurm delays nothing, and is asked once. Tests with the real Slurm are in tests/slurm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ops.adapters import slurm
from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on Slurm answers, and an answer stays good for as long as a busy machine needs to ask again."""

    def answers() -> None:
        monkeypatch.setattr(slurm, "ANSWER_SECONDS", 60.0)
        (tmp_path / "answer").touch()

    return answers


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Make a Slurm command that notes its call, waits for a file `answer`, and runs `then`. Returns the notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)

    def make(name: str, then: str) -> Path:
        notes = tmp_path / f"{name}.calls"
        wait = f"echo called >> {notes}\nwhile [ ! -e {tmp_path}/answer ]; do sleep 0.05; done\n"
        (folder / name).write_text(f"#!/bin/sh\n{wait}{then}\n")
        (folder / name).chmod(0o755)
        return notes

    return make


def insist(ask: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except NotYet:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_submission_that_takes_long_is_one_submission(
    tmp_path: Path, command: Callable[[str, str], Path], answers: Callable[[], None]
):
    command("srun", "exit 0")
    calls = command("sbatch", "echo Submitted batch job 7")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    for _ in range(3):
        with pytest.raises(NotYet, match="sbatch has not answered"):
            scheduler.submit("1-n0", 2, ())
    answers()
    assert insist(lambda: scheduler.submit("1-n0", 2, ())) == "7"
    assert calls.read_text() == "called\n"


def test_a_drain_that_is_refused_late_is_refused(
    tmp_path: Path, command: Callable[[str, str], Path], answers: Callable[[], None]
):
    calls = command("scontrol", "echo slurm_update error: Invalid user id >&2; exit 1")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    with pytest.raises(NotYet):
        scheduler.drain("n1", "opt-ops 1-i000: silent")
    answers()
    with pytest.raises(Refused, match="not permitted to drain n1"):
        insist(lambda: scheduler.drain("n1", "opt-ops 1-i000: silent"))
    assert calls.read_text() == "called\n"


@pytest.fixture
def slurm_says(
    tmp_path: Path, command: Callable[[str, str], Path], answers: Callable[[], None]
) -> Callable[..., SlurmScheduler]:
    """A scheduler whose Slurm answers at once, in these words."""

    def says(**words: str) -> SlurmScheduler:
        answers()
        for name, then in words.items():
            command(name, then)
        return SlurmScheduler(tmp_path, SlurmOptions(), print)

    return says


@pytest.mark.parametrize("nonsense", ["echo slurm_load_jobs", "echo '7||n1|N/A|None'", "printf '7|R\\377|n|N/A|x\\n'"])
def test_nonsense_is_no_state_of_a_job(slurm_says: Callable[..., SlurmScheduler], nonsense: str):
    with pytest.raises(SchedulerUnavailable, match="Slurm reports"):
        insist(lambda: slurm_says(squeue=nonsense).state("7"))


def test_nonsense_is_not_that_there_are_no_jobs(slurm_says: Callable[..., SlurmScheduler]):
    with pytest.raises(SchedulerUnavailable, match="Slurm reports"):
        insist(slurm_says(squeue="echo slurm_load_jobs: hello").jobs)


def test_a_comment_of_two_lines_hides_no_job(slurm_says: Callable[..., SlurmScheduler], tmp_path: Path):
    ours = f"echo '8|opt-ops-1-n0|opt-ops 1-n0 of {tmp_path}'"
    scheduler = slurm_says(squeue=f"printf '7|mine|note\\nto self\\n'; {ours}")
    assert insist(scheduler.jobs) == [("8", "1-n0")]


def test_a_job_that_nobody_remembers_has_ended(slurm_says: Callable[..., SlurmScheduler]):
    """The site has no accounting, and no daemon ran during the minutes in which slurmctld remembers the job."""
    unknown = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    scheduler = slurm_says(
        squeue=unknown, sacct="echo Slurm accounting storage is disabled >&2; exit 1", scancel=unknown
    )
    assert insist(lambda: scheduler.state("7")).status is AllocationStatus.ENDED
    insist(lambda: scheduler.cancel("7"))


@pytest.mark.parametrize("sacct", ["exit 1", "echo slurmdbd is down >&2; exit 1"])
def test_without_an_answer_from_accounting_the_end_of_a_job_is_not_known(
    slurm_says: Callable[..., SlurmScheduler], sacct: str
):
    unknown = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    with pytest.raises(SchedulerUnavailable):
        insist(lambda: slurm_says(squeue=unknown, sacct=sacct).state("7"))


def test_a_node_that_slurm_does_not_know_is_neither_excluded_nor_drained(
    slurm_says: Callable[..., SlurmScheduler], tmp_path: Path
):
    scheduler = slurm_says(
        srun="exit 0",
        sinfo="printf 'n1\\nn2\\n'",
        sbatch=f'cat "$1" > {tmp_path}/script; echo Submitted batch job 7',
        scontrol="echo slurm_update error: Invalid node name specified >&2; exit 1",
    )
    assert insist(lambda: scheduler.submit("1-n0", 2, ("n1", "n0311"))) == "7"
    assert "--exclude=n1\n" in (tmp_path / "script").read_text()
    with pytest.raises(Refused, match="does not know the node n0311"):
        insist(lambda: scheduler.drain("n0311", "a typing error"))
