"""`opt-ops run watch-job JOBID`: hangs, deaths, a controller that is down, files that come, rotate and are cut."""

from __future__ import annotations

import json
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from opt_ops import playbook_loader
from opt_ops.adapters.outbox import Outbox
from opt_ops.adapters.slurm.states import Job
from opt_ops.config import load
from opt_ops.core.detect.hang import HangRule
from opt_ops.core.failures.classes import cause
from opt_ops.core.values import Status
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import look
from opt_ops.supervise.daemon import Daemon
from opt_ops.supervise.site import SystemClock
from opt_ops.watch_job import job_poll
from opt_ops.watch_job import watch as watch_module
from opt_ops.watch_job.job import JobRecord
from opt_ops.watch_job.lineage import ShadowLineage, Watched
from tests.watch_job.recordings import WRITERS, recording, updates
from tests.watch_job.watched import Slurm, in_background, telemetry, until, watch

FAST = HangRule(multiple=2.0, floor_seconds=3.0, startup_seconds=60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A floor of 3 s in place of 30 s: the rule is the same."""
    real = watch_module.JobWatch.__init__

    def init(self, subject, lineage, hang, say, blind):
        real(self, subject, lineage, FAST, say, blind)

    monkeypatch.setattr(watch_module.JobWatch, "__init__", init)


def lines_of(slurm: Slurm) -> int:
    """Lines of telemetry that were written by now."""
    file = slurm.folder.parent / "runs/1/1.00/a0/telemetry.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


class Clock:
    """The time of the watch, which passes as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_796_000_000.0 + self.now


class Poll:
    """A job that runs."""

    number, why, gone, over, running = "812", "", False, False, True
    record = JobRecord(number="812", word="RUNNING", meaning=Job.HOLDS)

    def look(self) -> None:
        pass

    def blind(self, now: float) -> str:
        return ""


@pytest.mark.parametrize("name", WRITERS)
def test_a_silence_is_found_in_every_format(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    clock, found, log, write = Clock(), [], folder / "train.log", WRITERS[name][1]
    monkeypatch.setattr(watch_module, "time", clock)
    policy, _ = playbook_loader.load(playbook_loader.folder())
    watched = Watched(recipe="job 812", settings=(), author="ann", job="812")
    outbox = Outbox(lambda alert: None)
    lineage = ShadowLineage(folder / "runs", "", watched, policy, SystemClock(), outbox, found.append)
    subject = watch_module.Subject(logs=[log], poll=Poll())
    watch = watch_module.JobWatch(subject, lineage, policy.hang, lambda remark: None, lambda why: None)

    log.write_text(recording(name, last=40))
    for _ in range(20):
        clock.now += 1
        watch.step()
    for update in updates(60, first=41):
        with log.open("a") as file:
            file.write(write(update))
        clock.now += 20 if update.step == 50 else 2
        watch.step()
    for _ in range(41):
        clock.now += 1
        watch.step()
    assert not found, "twice the longest gap, of 21 s, is not over"
    for _ in range(3):
        clock.now += 1
        watch.step()
    assert [(s.signal, s.step) for s in found] == [("hang", 60)]
    assert cause(found[0]).startswith("no line for 4")
    assert "job 812 is RUNNING" in cause(found[0])
    lineage.close()


def test_lines_from_before_the_watch_have_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """They let nobody call a silence a hang, for the 15 minutes of a start. Stamps are a time."""
    for name, first in (("nanoGPT", 900), ("transformers 5", 900), ("Megatron-LM", 40)):
        clock, found, log = Clock(), [], folder / "train.log"
        monkeypatch.setattr(watch_module, "time", clock)
        policy, _ = playbook_loader.load(playbook_loader.folder())
        watched = Watched(recipe="job 812", settings=(), author="ann", job="812")
        lineage = ShadowLineage(
            folder / "runs", "", watched, policy, SystemClock(), Outbox(lambda alert: None), found.append
        )
        subject = watch_module.Subject(logs=[log], poll=Poll())
        watch = watch_module.JobWatch(subject, lineage, policy.hang, lambda remark: None, lambda why: None)
        log.write_text(recording(name, last=40))
        began = clock.now
        while not found:
            clock.now += 5
            watch.step()
        assert first - 10 <= clock.now - began <= first + 10
        lineage.close()


def test_a_hang_is_found_and_over(slurm: Slurm, impatient: None):
    slurm.log.write_text(recording("nanoGPT", last=40))
    runs = slurm.folder.parent / "runs"

    def job() -> None:
        until(lambda: lines_of(slurm) >= 40)
        with slurm.log.open("a") as log:
            for update in updates(60, first=41):
                log.write(WRITERS["nanoGPT"][1](update))
                log.flush()
                time.sleep(0.05)
        until(lambda: any(s.signal == "hang" for s in lineages.state(runs / "1").signals.values()))
        slurm.says("COMPLETED")

    thread = in_background(job)
    ran = watch("812")
    thread.join()
    assert ran.code == 5
    assert set(ran.kinds) == {"hang"}
    assert "job 812 is RUNNING" in ran.findings[-1]["text"]
    assert [line["num_updates"] for line in telemetry(ran)] == list(range(1, 61))
    assert lineages.state(ran.lineage).status is Status.COMPLETED
    assert set(slurm.called) == {"scontrol show job 812"}


def test_no_hang_while_the_job_waits(slurm: Slurm, impatient: None):
    slurm.log.write_text("")

    def job() -> None:
        until((slurm.folder.parent / "runs/1/journal").exists)
        slurm.log.write_text(recording("nanoGPT", last=30))
        until(lambda: lines_of(slurm) >= 30)
        slurm.says("PENDING")
        calls = len(slurm.called)
        until(lambda: len(slurm.called) > calls + 2)
        time.sleep(4)  # longer than the floor
        slurm.says("COMPLETED")

    thread = in_background(job)
    ran = watch("812")
    thread.join()
    assert (ran.code, ran.findings) == (0, [])


@pytest.mark.parametrize(
    ("state", "exit_", "words", "kind", "status"),
    [
        ("FAILED", "1:0", "RuntimeError: something else", "process_death", Status.HALTED),
        ("FAILED", "0:9", "", "process_death", Status.HALTED),
        ("FAILED", "1:0", "torch.OutOfMemoryError: CUDA out of memory.", "out_of_memory", Status.HALTED),
        ("OUT_OF_MEMORY", "0:125", "", "out_of_memory", Status.HALTED),
        ("TIMEOUT", "0:15", "", "time_limit", Status.HALTED),
        ("NODE_FAIL", "0:0", "", "allocation_lost", Status.HALTED),
        ("CANCELLED", "0:15", "", "job_cancelled", Status.CANCELLED),
    ],
)
def test_how_a_job_ended(slurm: Slurm, state: str, exit_: str, words: str, kind: str, status: Status):
    slurm.log.write_text(recording("nanoGPT", last=40) + f"{words}\n")
    slurm.says(state, exit_)
    ran = watch("812")
    assert (ran.code, ran.kinds) == (5, [kind])
    assert f"job 812 ended {state}" in ran.findings[0]["text"]
    assert words in ran.findings[0]["text"]
    assert lineages.state(ran.lineage).status is status
    assert lineages.state(ran.lineage).finished


def test_a_job_that_the_controller_has_forgotten(slurm: Slurm):
    slurm.log.write_text(recording("nanoGPT", last=40))
    (slurm.folder / "forgotten").touch()
    row = f"812|FAILED|1:0|gpu[001-002]|{slurm.folder}|train|{slurm.log}|{slurm.log}\n"
    (slurm.folder / "accounts").write_text(row)
    ran = watch("812")
    assert (ran.code, ran.kinds) == (5, ["process_death"])
    (slurm.folder / "accounts").write_text("")
    assert watch("812").code == 3


def test_a_controller_that_is_down_is_told(slurm: Slurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_poll, "BLIND_SECONDS", 0.5)
    runs = slurm.folder.parent / "runs"
    slurm.log.write_text(recording("nanoGPT", last=40))

    def job() -> None:
        until(lambda: lines_of(slurm) >= 40)
        (slurm.folder / "down").touch()
        until(lambda: lineages.state(runs / "1").failing)
        (slurm.folder / "down").unlink()
        until(lambda: not lineages.state(runs / "1").failing)
        slurm.says("COMPLETED")

    thread = in_background(job)
    ran = watch("812")
    thread.join()
    assert ran.kinds == ["blind"]
    assert "Unable to contact slurm controller" in ran.findings[0]["text"]
    assert ran.code == 0, "it saw again, and how the job ended"
    (slurm.folder / "down").touch()
    assert watch("812").code == 75, "and nothing says where the log is"


def test_files_that_come_late_rotate_and_are_cut(slurm: Slurm, impatient: None):
    write = WRITERS["nanoGPT"][1]

    def put(first: int, last: int, mode: str = "a") -> None:
        text = "".join(map(write, updates(last, first=first)))
        with slurm.log.open(mode) as log:
            log.write(text[:-7])
            log.flush()
            time.sleep(0.2)  # half a line is there for a moment
            log.write(text[-7:])
        until(lambda: lines_of(slurm) >= last)

    def job() -> None:
        until((slurm.folder.parent / "runs/1/journal").exists)
        put(1, 20)
        slurm.log.rename(slurm.log.with_suffix(".1"))
        put(21, 40)
        os.truncate(slurm.log, 0)
        put(41, 60)
        put(61, 100, "w")
        slurm.says("COMPLETED")

    thread = in_background(job)
    ran = watch("812")
    thread.join()
    assert (ran.code, ran.findings) == (0, [])
    assert [line["num_updates"] for line in telemetry(ran)] == list(range(1, 101))


def test_several_logs(slurm: Slurm, folder: Path):
    data = Path(__file__).parent / "data"
    slurm.says("COMPLETED")
    logs = [str(data / f"transformers-5.23-{name}.log") for name in ("stdout", "stderr")]
    ran = watch("812", "--log", logs[0], "--log", logs[1])
    assert ran.code == 0
    assert [line["num_updates"] for line in telemetry(ran)] == list(range(5, 45, 5))


def test_who_watches_and_how_the_watch_is_ended(slurm: Slurm, folder: Path):
    runs, seen = folder / "runs", []
    slurm.log.write_text(recording("nanoGPT", last=40))

    def operator() -> None:
        until(lambda: lines_of(slurm) >= 40)
        seen.append(look(runs, time.time()).over("1").watched)
        os.kill(os.getpid(), signal.SIGINT)

    thread = in_background(operator)
    ran = watch("812")
    thread.join()
    assert seen == [True]
    assert ran.code == 0
    state = lineages.state(ran.lineage)
    assert state.status is Status.CANCELLED
    assert "job 812 was not touched" in state.why
    assert not look(runs, time.time()).over("1").watched
    assert "watch-job" in look(runs, time.time()).over("1").why


def test_a_file_that_cannot_be_read_is_told(slurm: Slurm):
    slurm.log.mkdir()
    runs = slurm.folder.parent / "runs"

    def job() -> None:
        until(lambda: (runs / "1/journal").exists() and lineages.state(runs / "1").failing)
        slurm.says("COMPLETED")

    thread = in_background(job)
    ran = watch("812")
    thread.join()
    assert ran.code == 75
    assert ran.kinds[0] == "blind"
    assert "it is a folder" in ran.findings[0]["text"]


def test_alerts_go_where_the_site_says(slurm: Slurm, folder: Path):
    got: list[dict[str, str]] = []

    class Post(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Post) as server:
        in_background(server.serve_forever)
        (folder / "opt-ops.toml").write_text(f'[alerts]\nurls = ["http://127.0.0.1:{server.server_port}/"]\n')
        slurm.log.write_text(recording("nanoGPT", last=520, diverges=400))
        slurm.says("FAILED", "1:0")
        ran = watch("812")
        server.shutdown()
    assert ran.code == 5
    titles = "\n".join(each["title"] for each in got)
    assert "loss" in titles
    assert "HALTED" in titles, "the end of the job"
    assert any("whoever runs this training must act" in each["body"] for each in got)
    assert all(alert.delivered for alert in lineages.state(ran.lineage).alerts.values())


def test_a_daemon_leaves_the_lineage_of_a_watch_alone(slurm: Slurm, folder: Path):
    slurm.log.write_text(recording("nanoGPT", last=40))
    slurm.says("COMPLETED")
    ran = watch("812")
    daemon = Daemon(load(None))
    assert not daemon._may_take_over(ran.lineage)
    (ran.lineage / "watch-job.json").unlink()
    assert daemon._may_take_over(ran.lineage)


def test_a_log_alone_is_followed_until_somebody_ends_it(folder: Path):
    log, runs = folder / "late.log", folder / "runs"

    def writer() -> None:
        until((runs / "1/journal").exists)
        log.write_text(recording("torchtitan", last=30))
        until((runs / "1/1.00/a0/telemetry.jsonl").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = in_background(writer)
    ran = watch("--from-file", "late.log", "--follow")
    thread.join()
    assert ran.code == 0
    assert len(telemetry(ran)) == 30
    assert "SIGTERM" in lineages.state(ran.lineage).why
