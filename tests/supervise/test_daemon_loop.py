"""The daemon's loop goes on, whatever fails around it, and tells what fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.config import Chronicle, Config, Evaluate, Mlflow
from opt_ops.core.decide.policy import EvaluationRule
from opt_ops.core.events import EvaluationEnded, StopRequested
from opt_ops.core.state.model import State
from opt_ops.core.values import AllocationStatus, EvaluationEnd, Outcome
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.runfolder.files import read_json, write_json
from opt_ops.runfolder.journal import Journal
from opt_ops.supervise import own_sign, projections
from opt_ops.supervise.daemon import Daemon
from opt_ops.supervise.projections import Projection
from tests.core.story import POLICY, Story
from tests.supervise.test_campaigns import START

HOST = os.uname().nodename


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws_nothing: None) -> Iterator[Daemon]:
    """A daemon with one lineage that waits for nodes; each step signs, and draws."""
    journal = Journal(tmp_path / "runs" / "12" / "journal")
    story = Story()
    story.begin()
    for entry in story.entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    journal.close()
    monkeypatch.setattr(own_sign, "_SECONDS", 0.0)
    runs = tmp_path / "runs"
    config = Config(runs=runs, mlflow=Mlflow(enabled=False), chronicle=Chronicle(every_seconds=1))
    made = Daemon(config)
    monkeypatch.setattr("opt_ops.supervise.daemon.scheduler_of", lambda *_: NoNodes())
    yield made
    made._leave()


class NoNodes:
    """A scheduler that never gives nodes."""

    grace_seconds = 5.0

    def submit(self, *_: Any) -> str:
        return "77"

    def jobs(self) -> list[tuple[str, str]]:
        return []

    def state(self, *_: Any) -> Any:
        from opt_ops.core.values import AllocationStatus
        from opt_ops.ports import JobState

        return JobState(AllocationStatus.QUEUED, (), "")

    def cancel(self, job: str) -> None:
        pass


def test_a_lineage_whose_last_evaluation_has_failed_once_is_watched_until_it_is_tried_again(tmp_path: Path):
    story = Story(replace(POLICY, evaluation=EvaluationRule(every=200, tasks=("piqa",), on_spares=False)))
    story.now = time.time() - 60.0
    story.begin()
    story.hold("n1", "n2", "n3")
    story.train(1000)
    story.ends(Outcome.COMPLETED, 1000)
    story.checkpoint(1000)
    story.changed("12-n0", status=AllocationStatus.ENDED)
    story.see(EvaluationEnded(evaluation="12-ev001", end=EvaluationEnd.FAILED, why="exit code 75"))
    assert story.state.finished
    story.save(tmp_path / "12")
    off = Mlflow(enabled=False)
    config = Config(runs=tmp_path, mlflow=off, evaluate=Evaluate(every=200, tasks=["piqa"], where="daemon"))
    daemon = Daemon(config)
    try:
        daemon._take_over_all()
        (supervisor,) = daemon._supervisors.values()
        assert supervisor.settled
        assert not supervisor.finished
    finally:
        daemon._leave()


def sign(daemon: Daemon) -> dict[str, Any]:
    return read_json(daemon._config.runs / "daemon.json") or {}


def stale(*_: Any) -> Any:
    raise OSError(errno.ESTALE, "Stale file handle")


def no_process(*_: Any, **__: Any) -> Any:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_runs_folder_that_cannot_be_listed_costs_nothing_that_is_watched(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, number: int
):
    daemon._step()
    assert sign(daemon)["lineages"] == ["12"]

    def fails(runs: Path) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(lineages, "folders", fails)
        for _ in range(3):
            daemon._step()
        told = sign(daemon)
        assert told["lineages"] == ["12"]
        assert [(each["what"], os.strerror(number) in each["why"]) for each in told["problems"]] == [
            ("the search for lineages", True)
        ]
        assert not daemon._idle()
    daemon._step()
    assert sign(daemon)["problems"] == []


def test_no_strange_entry_of_the_runs_folder_hides_a_lineage_or_a_campaign(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
):
    runs = daemon._config.runs
    lineages.ask(campaigns.create(runs, "sizes"), "ann", "start", {}, time.time())
    for folder in (runs, runs / "campaigns"):
        for name in ("²", "99", "with\nnewline"):
            (folder / name).symlink_to("x" * 300)
        (folder / "13").symlink_to("13")
        os.mkfifo(folder / "14")
        (folder / "15").write_text("no folder")
    (runs / ("9" * 200)).mkdir()
    for _ in range(3):
        daemon._step()
    assert sign(daemon)["lineages"] == ["12"]
    assert sign(daemon)["problems"] == []
    assert [path.name for path in campaigns.folders(runs)] == ["sizes"]
    assert lineages.next_number(runs) == 13
    assert "failed" not in caplog.text


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "folder", "link"]
)
def test_what_is_no_file_in_the_folder_of_a_campaign_holds_up_neither_another_one_nor_a_lineage(
    daemon: Daemon, make: Callable[[Path], None]
):
    runs = daemon._config.runs
    for name in ("journal", "journal.owner.json", "journal.tip", "inbox", "inbox/a.json", "journal/000001.jsonl"):
        path = campaigns.create(runs, f"bad-{name.replace('/', '-')}")
        if not name.startswith("inbox"):
            lineages.ask(path, "ann", "start", START, time.time())
        (path / name).parent.mkdir(exist_ok=True)
        make(path / name)
    good = campaigns.create(runs, "good")
    lineages.ask(good, "ann", "start", START, time.time())
    until(lambda: (daemon._step(), campaigns.state(good).started)[1])
    assert "12" in sign(daemon)["lineages"]
    assert {each["what"] for each in sign(daemon)["problems"]} <= {"campaigns"}


def test_what_lies_in_the_inbox_of_a_finished_lineage_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    story = Story()
    story.begin()
    story.see(StopRequested(request="r", author="ann", reason=""))
    story.changed("12-n0", status=AllocationStatus.ENDED)
    assert story.state.finished
    story.save(tmp_path / "12")
    inbox = tmp_path / "12" / "inbox"
    (inbox / "x.refused" / "full").mkdir(parents=True)
    (inbox / "x.json").write_text("no request")
    daemon = Daemon(Config(runs=tmp_path, mlflow=Mlflow(enabled=False)))
    try:
        for _ in range(5):
            daemon._take_over_all()
        assert not daemon._supervisors
        assert caplog.text.count("x.json cannot be renamed and is not looked at again") == 1
    finally:
        daemon._leave()


def test_a_campaign_that_cannot_be_advanced_is_told_until_it_can(daemon: Daemon, caplog: pytest.LogCaptureFixture):
    journal = campaigns.create(daemon._config.runs, "sizes") / "journal"
    journal.write_text("a file where a folder belongs")
    daemon._step()
    for _ in range(3):  # also in a step that is too early for another look
        (problem,) = sign(daemon)["problems"]
        assert problem["what"] == "campaigns"
        assert "campaign sizes: " in problem["why"]
        daemon._step()
    assert "works again" not in caplog.text
    journal.unlink()
    until(lambda: (daemon._step(), not sign(daemon)["problems"])[1])
    assert sign(daemon)["lineages"] == ["12"]


@pytest.mark.parametrize("whose", ["damaged", "another daemon's"])
def test_a_journal_of_a_size_that_is_not_watched_here_is_not_read_in_each_round(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, whose: str
):
    runs = daemon._config.runs
    daemon._step()
    if whose == "damaged":
        daemon._abandon(runs / "12", "a line is damaged", fenced=False)
        daemon._release_lineage(runs / "12")
    else:
        other = Journal(runs / "12" / "journal")
        daemon._step()
        other.close()
    read: list[Path] = []
    monkeypatch.setattr(lineages, "state", lambda path: (read.append(path), State(requests={"a": 1}))[1])
    found = {daemon._lineage_state("12") == State() for _ in range(100)}
    assert found == {whose == "damaged"}
    assert len(read) == (whose != "damaged")


def test_a_projection_that_cannot_be_started_is_told_and_tried_again(daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    daemon._step()
    (drawn,) = daemon._projections.values()
    with monkeypatch.context() as patch:
        patch.setattr(projections.subprocess, "Popen", no_process)
        drawn[0].stale, drawn[0].ran_at = True, -1e9
        daemon._step()
        (problem,) = sign(daemon)["problems"]
        assert (problem["what"], problem["lineage"]) == ("logbook render", "12")
        assert "cannot be started" in problem["why"]
        assert sign(daemon)["lineages"] == ["12"]
    drawn[0].not_before = 0.0
    until(lambda: (daemon._step(), not sign(daemon)["problems"])[1])


def test_a_liveness_file_that_cannot_be_written_does_not_end_the_watch(daemon: Daemon, monkeypatch: pytest.MonkeyPatch):
    daemon._step()
    before = sign(daemon)["ts"]
    with monkeypatch.context() as patch:
        patch.setattr(own_sign, "write_json", stale)
        daemon._step()
        assert sign(daemon)["ts"] == before
        assert [path.name for path in daemon._supervisors] == ["12"]
    daemon._step()
    assert sign(daemon)["ts"] > before


def test_a_daemon_that_leaves_signs_it(daemon: Daemon):
    daemon._step()
    assert "left_at" not in sign(daemon)
    daemon._leave()
    assert abs(sign(daemon)["left_at"] - time.time()) < 60


def test_two_daemons_do_not_hide_each_other(tmp_path: Path):
    other = {"ts": time.time(), "host": "login2", "pid": 7, "version": "0", "policy": "p", "lineages": ["13"]}
    write_json(tmp_path / "daemon.json", other)
    mine = own_sign.OwnSign(tmp_path, "p")
    mine.write(own_sign.Watching(lineages=["12"], fenced=["13"]))
    assert read_json(tmp_path / "daemon.json") == other
    watch = own_look(tmp_path)
    assert (watch.over("12").watched, watch.over("13").watched) == (True, True)
    write_json(tmp_path / "daemon.json", other | {"left_at": time.time()})
    mine.write(own_sign.Watching(lineages=["12"], fenced=["13"]), left=False)
    assert own_look(tmp_path).over("13").finding == "fenced"


def own_look(runs: Path) -> Any:
    """As a reader on a third host sees it."""
    from opt_ops.runfolder import liveness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(liveness.socket, "gethostname", lambda: "elsewhere")
        return liveness.look(runs, time.time() + 3.0)


def until(true: Callable[[], Any], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_projection_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(command: Any, **options: Any) -> Any:
        started.append(real([sys.executable, "-c", program], **options))
        return started[-1]

    monkeypatch.setattr(projections.subprocess, "Popen", start)
    drawn = Projection(("logbook", "render", "12", "-q"), every=0.0, limit=3600.0)
    drawn.step(now=True)
    until(lambda: child.exists() and child.read_text())
    drawn.step(now=False)
    assert drawn.why == ""
    drawn.limit, drawn.every = 0.0, 3600.0
    until(lambda: (drawn.step(now=False), drawn.process is None)[1])
    assert started[0].returncode == -signal.SIGKILL
    assert "did not end in 0 s, so it was killed" in drawn.why
    until(lambda: not running(int(child.read_text())))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_queued_examinations_do_not_hold_up_a_stop(tmp_path: Path):
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from opt_ops.core.values import Checkpoint
from opt_ops.runfolder import checkpoints
checkpoints.problem = lambda checkpoint: time.sleep(600)
store = checkpoints.FileCheckpoints(Path({str(tmp_path)!r}))
for step in range(20):
    store.examine(Checkpoint(run="12.00", step=step, path=f"/c/step-{{step:08d}}"))
store.close()
"""
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], timeout=240).returncode == 0
    assert time.monotonic() - began < 120
    assert FileCheckpoints(tmp_path).examined() == []
