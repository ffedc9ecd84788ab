"""The daemon as a Slurm job that follows itself, on a real Slurm: killed, it is replaced, and training goes on."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_ops.cli.daemon.units import job_name
from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.runfolder.files import read_json
from tests.e2e.site import Site, until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import quiet
from tests.slurm.day import requests_were_needed

pytestmark = pytest.mark.slurm

CONFIG = 'scheduler = "slurm"\n[slurm]\npartition = "main"\ntime_minutes = 30'


def ask(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def site(tmp_path: Path, slurm: Cluster) -> Iterator[Site]:
    folder = tmp_path / "a site's 100%"
    folder.mkdir()
    site = Site(folder, CONFIG)
    (folder / "daemon.log").touch()  # where Site looks; this daemon writes to the runs folder
    yield site
    until(lambda: subprocess.run(["scancel", "--me"], check=True) and not ask("squeue", "-h"))  # it submits itself
    site.close()
    quiet(slurm)


def jobs(site: Site, state: str) -> list[str]:
    return ask("squeue", "-h", "--me", f"--name={job_name(site.runs)}", f"--states={state}", "-o", "%i")


def sign(site: Site) -> dict[str, Any]:
    return read_json(site.runs / "daemon.json") or {"pid": None}


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_a_killed_daemon_is_followed_by_the_next_job_and_training_goes_on(site: Site):
    script = site.folder / "daemon.sh"
    script.write_text(site.command("daemon", "unit", "slurm"))
    site.start("steps=100000", "checkpoint_every=50")
    (first,) = ask("sbatch", "--parsable", str(script))
    site.wait(lambda state: state.status is Status.TRAINING)
    (second,) = until(lambda: jobs(site, "PENDING"))
    killed, attempt = sign(site)["pid"], site.state().attempt
    ranks = site.pids(attempt.name)

    trained = environment(ranks[0])
    job = site.state().allocation.job
    assert trained["SLURM_JOB_ID"] == job != first
    assert trained["SLURM_JOB_NAME"] == "opt-ops-1-n0"
    assert "SLURM_CPUS_PER_TASK" not in trained, "the daemon's job has it, and the lineage's was not asked for it"

    before = site.state()
    os.kill(killed, signal.SIGKILL)
    until(lambda: first not in jobs(site, "RUNNING"))
    ask("scontrol", "update", f"jobid={second}", "starttime=now")  # not to wait for its minute
    until(lambda: sign(site)["pid"] not in (None, killed))
    assert jobs(site, "RUNNING") == [second]
    (third,) = until(lambda: jobs(site, "PENDING"))
    assert third not in (first, second)

    site.wait(lambda state: state.epoch > before.epoch and state.status is Status.TRAINING)
    assert site.state().attempt.name == attempt.name, "training was not touched"
    assert site.pids(attempt.name) == ranks
    submitted = [x.event.job for x in site.entries() if isinstance(x.event, e.AllocationSubmitted)]
    assert submitted[0] == job
    assert not {first, second, third} & set(submitted), "the daemon's own jobs are none of the lineage's"
    requests_were_needed(site.entries())

    ask("scancel", "--me", f"--name={job_name(site.runs)}")
    until(lambda: not jobs(site, "PENDING,RUNNING,COMPLETING"))
    assert job in ask("squeue", "-h", "-o", "%i"), "ending the watch does not end training"


def test_a_daemon_that_cannot_start_is_no_storm_of_jobs(site: Site, monkeypatch: pytest.MonkeyPatch):
    script = site.folder / "daemon.sh"
    script.write_text(site.command("daemon", "unit", "slurm"))
    (site.folder / "opt-ops.toml").write_text("nonsense = 1\n")
    (first,) = ask("sbatch", "--parsable", str(script))
    until(lambda: ask("squeue", "-h", "-t", "all", "-j", first, "-o", "%T") == ["FAILED"])
    (second,) = jobs(site, "all")[-1:]
    assert second != first
    monkeypatch.setenv("SLURM_TIME_FORMAT", "%s")
    times = dict(word.split("=", 1) for word in ask("scontrol", "show", "job", second) if "Time=" in word)
    # a minute from when sbatch was started; a busy controller takes the job later
    assert 0 < int(times["EligibleTime"]) - int(times["SubmitTime"]) <= 60
    assert "nonsense" in (site.runs / "daemon.log").read_text()
