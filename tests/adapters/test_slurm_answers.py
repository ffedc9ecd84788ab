"""A slow Slurm delays nothing, and is asked once. Tests with the real Slurm are in tests/slurm."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler, command, questions
from opt_ops.adapters.slurm.command import ask
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable
from tests.adapters.slurm_stand_in import insist

Make = Callable[[str, str], Path]


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on Slurm answers, and an answer stays good for as long as a busy machine needs to take it."""

    def answers() -> None:
        monkeypatch.setattr(questions, "KEPT_SECONDS", 600.0)
        (tmp_path / "answer").touch()

    return answers


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a Slurm command that notes its call, waits for a file `answer`, and runs `then`. Returns the notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, then: str) -> Path:
        notes = tmp_path / f"{name}.calls"
        wait = f"echo called >> {notes}\nwhile [ ! -e {tmp_path}/answer ]; do sleep 0.05; done\n"
        (folder / name).write_text(f"#!/bin/sh\n{wait}{then}\n")
        (folder / name).chmod(0o755)
        return notes

    return make


def test_a_submission_that_takes_long_is_one_submission(tmp_path: Path, stand_in: Make, answers: Callable[[], None]):
    stand_in("srun", "exit 0")
    calls = stand_in("sbatch", "echo Submitted batch job 7")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    for _ in range(3):
        with pytest.raises(NotYet, match="sbatch has not answered"):
            scheduler.submit("1-n0", 2, ())
    answers()
    assert insist(lambda: scheduler.submit("1-n0", 2, ())) == "7"
    assert calls.read_text() == "called\n"


def test_a_drain_that_is_refused_late_is_refused(tmp_path: Path, stand_in: Make, answers: Callable[[], None]):
    calls = stand_in("scontrol", "echo slurm_update error: Invalid user id >&2; exit 1")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    with pytest.raises(NotYet):
        scheduler.drain("n1", "opt-ops 1-i000: silent")
    answers()
    with pytest.raises(Refused, match="not permitted to drain n1"):
        insist(lambda: scheduler.drain("n1", "opt-ops 1-i000: silent"))
    assert calls.read_text() == "called\n"


def test_twelve_lineages_and_a_controller_that_does_not_answer_hold_up_nobody(
    tmp_path: Path, stand_in: Make, answers: Callable[[], None]
):
    """However slow Slurm is: nobody waits, and each lineage asks once."""
    calls = stand_in("squeue", "echo '7|PENDING||N/A|N/A|opt-ops-1-n0|Priority'")
    lineages = [SlurmScheduler(tmp_path / str(number), SlurmOptions(), print) for number in range(12)]
    waited = threading.Event()
    for _ in range(3):
        for scheduler in lineages:
            for question in (lambda s=scheduler: s.state("7"), scheduler.jobs):
                with pytest.raises(NotYet):
                    question()
        waited.wait(0.1)
    deadline = time.monotonic() + 120
    while not calls.exists() or calls.read_text().count("called") < 24:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    answers()
    for scheduler in lineages:
        assert insist(lambda s=scheduler: s.state("7")).status is AllocationStatus.QUEUED
    assert calls.read_text().count("called") == 24


def test_an_answer_stands_for_a_while_and_then_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(questions, "time", type("Clock", (), {"monotonic": lambda: now[0], "time": lambda: now[0]}))
    outcomes: list[Any] = ["up"]

    def question() -> str:
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0]

    watched = questions.Watched(question)

    def settled() -> None:
        while watched._open is not None and not watched._open.done():
            time.sleep(0.01)

    with pytest.raises(NotYet):
        watched.read()
    settled()
    assert watched.read() == "up"
    outcomes[0] = SchedulerUnavailable("Unable to contact slurm controller")
    now[0] += questions.POLL_SECONDS
    for _ in range(3):
        assert watched.read() == "up"
        settled()
    now[0] += questions.STALE_SECONDS
    with pytest.raises(SchedulerUnavailable, match="Unable to contact slurm controller; last answer at 1970-01-01"):
        watched.read()
    settled()
    outcomes[0] = "up again"
    for _ in range(2):  # one question is answered already, and the next is asked after a pause
        now[0] += questions.POLL_SECONDS
        with pytest.raises(SchedulerUnavailable):
            watched.read()
        settled()
    assert watched.read() == "up again"


@pytest.fixture
def slurm_says(tmp_path: Path, stand_in: Make, answers: Callable[[], None]) -> Callable[..., SlurmScheduler]:
    """A scheduler whose Slurm answers at once, in these words."""

    def says(**words: str) -> SlurmScheduler:
        answers()
        for name, then in words.items():
            stand_in(name, then)
        return SlurmScheduler(tmp_path, SlurmOptions(), print)

    return says


@pytest.mark.parametrize("nonsense", ["echo slurm_load_jobs", "echo '7||n1|N/A|None'", "printf '7|R\\377|n|N/A|x\\n'"])
def test_nonsense_is_no_state_of_a_job(slurm_says: Callable[..., SlurmScheduler], nonsense: str):
    scheduler = slurm_says(squeue=nonsense)
    with pytest.raises(SchedulerUnavailable, match="Slurm reports"):
        insist(lambda: scheduler.state("7"))


def test_nonsense_is_not_that_there_are_no_jobs(slurm_says: Callable[..., SlurmScheduler]):
    scheduler = slurm_says(squeue="echo slurm_load_jobs: hello")
    with pytest.raises(SchedulerUnavailable, match="Slurm reports"):
        insist(scheduler.jobs)


def test_a_comment_of_two_lines_hides_no_job(slurm_says: Callable[..., SlurmScheduler], tmp_path: Path):
    ours = f"echo '8|opt-ops-1-n0|opt-ops 1-n0 of {tmp_path}'"
    scheduler = slurm_says(squeue=f"printf '7|mine|note\\nto self\\n'; {ours}")
    assert insist(scheduler.jobs) == [("8", "1-n0")]


@pytest.mark.parametrize(
    "sacct", ["echo Slurm accounting storage is disabled >&2; exit 1", "exit 1", "echo slurmdbd is down >&2; exit 1"]
)
def test_a_job_that_the_controller_has_forgotten_has_ended(slurm_says: Callable[..., SlurmScheduler], sacct: str):
    unknown = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
    scheduler = slurm_says(squeue=unknown, sacct=sacct, scancel=unknown)
    state = insist(lambda: scheduler.state("7"))
    assert (state.status, state.reason) == (AllocationStatus.ENDED, "FORGOTTEN")
    insist(lambda: scheduler.cancel("7"))


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


FOREIGN = (
    "SBATCH_TIMELIMIT",
    "SBATCH_REQUEUE",
    "SBATCH_PARTITION",
    "SLURM_JOB_ID",
    "SLURM_CLUSTERS",
    "SRUN_CPUS_PER_TASK",
)
FOREIGN += ("SQUEUE_STATES", "SACCT_FORMAT", "SINFO_PARTITION", "SCANCEL_STATE", "SALLOC_QOS", "SLURM_TIME_FORMAT")


def test_settings_of_the_daemons_shell_reach_neither_a_submission_nor_a_question(
    slurm_says: Callable[..., SlurmScheduler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in FOREIGN:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("MINE", "kept")
    keep = f"env > {tmp_path}/environment.$(basename $0)"
    scheduler = slurm_says(
        srun="exit 0",
        sbatch=f'{keep}; cat "$1" > {tmp_path}/script; echo Submitted batch job 7',
        squeue=f"{keep}; echo '7|PENDING||N/A|N/A|opt-ops-1-n0|Priority'",
    )
    scheduler._options = SlurmOptions(partition="main", time_minutes=90, additional={"requeue": False})
    assert insist(lambda: scheduler.submit("1-n0", 2, ())) == "7"
    insist(lambda: scheduler.state("7"))
    for command_ in ("sbatch", "squeue"):
        seen = (tmp_path / f"environment.{command_}").read_text().splitlines()
        assert [line for line in seen if "theirs" in line] == []
        assert {"SLURM_CONF=/etc/slurm.conf", "MINE=kept"} <= set(seen)
    assert "SLURM_TIME_FORMAT=%s" in (tmp_path / "environment.squeue").read_text()
    script = (tmp_path / "script").read_text()
    for line in ("job-name=opt-ops-1-n0", "partition=main", "time=90", "no-requeue", "nodes=2"):
        assert f"#SBATCH --{line}\n" in script
    assert os.environ["SBATCH_REQUEUE"] == "theirs", "only Slurm's commands do without them"


@pytest.mark.parametrize("error", [BlockingIOError(11, "Resource temporarily unavailable"), OSError(12, "no memory")])
def test_a_fork_that_fails_is_no_answer(
    tmp_path: Path, stand_in: Make, monkeypatch: pytest.MonkeyPatch, error: OSError
):
    def fails(*_: object, **__: object) -> None:
        raise error

    stand_in("srun", "exit 0")
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    monkeypatch.setattr("subprocess.Popen.__init__", fails)
    for question in (
        lambda: scheduler.state("7"),
        scheduler.jobs,
        lambda: scheduler.cancel("7"),
        lambda: scheduler.drain("n1", "x"),
        lambda: scheduler.submit("1-n0", 2, ()),
    ):
        with pytest.raises(SchedulerUnavailable, match="could not be"):
            insist(question)


def test_no_thread_left_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    scheduler = SlurmScheduler(tmp_path, SlurmOptions(), print)
    with pytest.raises(SchedulerUnavailable, match="can't start new thread"):
        insist(scheduler.jobs)


def test_a_command_that_hangs_is_given_up(stand_in: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "TIMEOUT_SECONDS", 0.3)
    stand_in("squeue", "exit 0")
    with pytest.raises(SchedulerUnavailable, match="did not answer"):
        ask("squeue", "-h")
    with pytest.raises(SchedulerUnavailable, match="not on the PATH"):
        ask("sfoo")
    with pytest.raises(SchedulerUnavailable, match="could not be started"):
        ask("squeue", "a\0b")
