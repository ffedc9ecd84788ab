"""Faults that hit the daemon itself: full and read-only disks, old and damaged journals, two daemons at once.

Training continues through all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.core.state.status import Status
from opt_ops.core.values import Outcome
from opt_ops.runfolder import lineages
from opt_ops.runfolder.journal import Fenced, Journal
from tests.e2e.site import Site, until

OLD = Path(__file__).parents[1] / "data" / "journal-first-light"


def logged(site: Site, words: str) -> None:
    until(lambda: words in (site.folder / "daemon.log").read_text())


def step_of(site: Site, attempt: str = "1.00/a0") -> int:
    return len((site.runs / "1" / attempt / "telemetry.jsonl").read_bytes().splitlines())


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """The journal's folder on a file system of one megabyte."""
    folder = site.runs / "1" / "journal"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def begin(site: Site, *settings: str) -> None:
    """Start a lineage in the folder that exists already."""
    arguments = {
        "lineage": "1",
        "recipe": "stub",
        "settings": list(settings),
        "data": [],
        "tokenizer": None,
        "shape": {"nodes": 2, "spares": 1, "ranks_per_node": 1},
    }
    lineages.ask(site.runs / "1", "ann", "start", arguments, time.time())


def test_a_full_disk_stops_the_watch_and_not_the_training(small_disk: Path, site: Site):
    begin(site, "steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    logged(site, "restarting in")  # the next checkpoint cannot be journaled
    seen = (site.folder / "daemon.log").read_text().count("restarting in")
    os.kill(site.pids("1.00-a0")[1], signal.SIGKILL)
    until(lambda: (site.folder / "daemon.log").read_text().count("restarting in") > seen + 1)
    assert site.pids("1.00-a0"), "the rank's death cannot be journaled, so nothing is done about it"
    assert len(site.state().attempts) == 1
    filler.unlink()
    state = site.wait(lambda state: state.incidents and state.attempt.name == "1.00-a1" and state)
    assert {i.kind for i in state.incidents.values()} >= {"process_death"}
    assert len([a for a in state.allocations.values() if a.job]) == 1, "nothing was submitted twice"


def test_a_runs_folder_that_cannot_be_written_is_an_error_and_not_a_loop(site: Site):
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(site.runs)]
        site.runs.mkdir()
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount")
        try:
            text = site.command("daemon", "run", code=1)
        finally:
            subprocess.run(["umount", "-l", str(site.runs)], check=True)
    else:
        site.runs.mkdir(mode=0o500)
        text = site.command("daemon", "run", code=1)
    assert "cannot be written" in text
    assert "next:" in text
    assert "Traceback" not in text


def test_a_corrupt_line_in_the_middle_ends_the_watch_over_that_lineage_only(site: Site):
    site.start("steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 1)
    site.kill_daemon()
    before = step_of(site)
    path = site.runs / "1" / "journal" / "000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"stub", b"stab"), *lines[2:]]))
    site.start("steps=50")
    site.start_daemon()
    logged(site, "line 2: fails its checksum")
    assert site.ended("2").status is Status.COMPLETED, "the other lineage is watched"
    assert step_of(site) > before, "training goes on"
    path.write_bytes(b"".join(lines))
    site.kill_daemon()
    site.start_daemon()
    state = site.wait(
        lambda state: any(i.kind == "daemon_restart" and i.proven for i in state.incidents.values()) and state
    )
    assert len(state.attempts) == 1


def test_a_torn_tail_costs_nothing(site: Site):
    site.start("steps=400", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 1)
    site.kill_daemon()
    with (site.runs / "1" / "journal" / "000001.jsonl").open("ab") as file:
        file.write(b'{"v": 1, "seq": 999, "epo')
    site.start_daemon()
    logged(site, "the last line is torn and was skipped")
    assert site.ended().status is Status.COMPLETED


def test_a_journal_of_the_first_version_tells_the_same(tmp_path: Path):
    shutil.copytree(OLD, tmp_path / "1" / "journal")
    state = lineages.state(tmp_path / "1")
    assert state.status is Status.COMPLETED
    told = [(i.kind, str(i.decision.action), i.steps_lost, i.proven) for i in state.incidents.values()]
    assert told == [
        ("process_death", "restart", 1, True),
        ("bad_gpu", "restart", 21, True),
        ("daemon_restart", "adopt", 0, True),
        ("loss_spike", "rollback", 164, True),
    ]
    assert [a.outcome for a in state.attempts.values()] == [
        Outcome.FAILED,
        Outcome.STOPPED,
        Outcome.STOPPED,
        Outcome.COMPLETED,
    ]
    assert state.finished


def test_of_two_daemons_on_two_hosts_the_older_one_stops(site: Site):
    site.start("steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    newer = Journal(site.runs / "1" / "journal")  # the first act of a daemon on another host, where flock has no effect
    logged(site, "epoch 2 has taken over")
    before = step_of(site)
    until(lambda: step_of(site) > before)
    Journal(site.runs / "1" / "journal").close()
    with pytest.raises(Fenced):
        newer.check_fence()
