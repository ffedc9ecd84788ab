"""The test cluster itself: jobs run, accounting answers, nodes die and come back, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import submitit

from . import cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slurm


@pytest.fixture
def folder(slurm: cluster.Cluster) -> Iterator[Path]:
    """A second cluster's, which is taken down even if the test fails, and by `make slurm-down` if it is killed."""
    folder = slurm.folder.with_name(f"{slurm.folder.name}-2")
    yield folder
    cluster.down(folder)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, cluster.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty for one that init has yet to reap
    except FileNotFoundError:
        return False


def processes_in(folder: Path) -> list[str]:
    """The command lines of all processes that work in the folder or have files open there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "cwd", *(process / "fd").iterdir()]
            if any(str(folder) in str(link.readlink()) for link in links):
                found.append((process / "cmdline").read_text())
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_submitit_job_on_two_nodes_returns_both_results(slurm: cluster.Cluster, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
    executor.update_parameters(
        name="two-nodes",
        nodes=2,
        tasks_per_node=1,
        timeout_min=2,
        slurm_comment="12.00-a1",
        slurm_additional_parameters={"no_kill": True, "no_requeue": True},
    )
    # a function of the standard library: the job could not import one of this module
    job = executor.submit(os.getenv, "SLURMD_NODENAME")

    nodes = job.results()
    assert len(nodes) == 2
    assert nodes[0] != nodes[1]
    assert set(nodes) <= set(slurm.nodes)
    fields = ["sacct", "-X", "-n", "-P", "-j", job.job_id, "-o", "State,JobName,NNodes,Comment"]
    wait_for(lambda: output(*fields) == "COMPLETED|two-nodes|2|12.00-a1")


def test_killed_node_dies_silently_and_its_job_lives_on(slurm: cluster.Cluster, tmp_path: Path) -> None:
    """What the supervisor's recovery rests on: --no-kill, --overlap, drain, and a node that comes back."""
    pids = tmp_path / "pids"
    pids.mkdir()
    work = f"echo $$ > {pids}/$SLURMD_NODENAME; exec sleep 60"
    script = f"srun sh -c '{work}' & sleep 60"
    job = output("sbatch", "--parsable", "-N2", "--no-kill", "--no-requeue", "--output=/dev/null", "--wrap", script)
    wait_for(lambda: len([path for path in pids.iterdir() if path.read_text().strip()]) == 2)
    first, second = sorted(path.name for path in pids.iterdir())

    slurm.kill_node(second)
    try:
        assert not alive(int((pids / second).read_text()))
        assert alive(int((pids / first).read_text()))
        assert slurm.states()[second] in cluster.USABLE, "nobody was notified"
        assert output("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING"
        step = ["srun", f"--jobid={job}", "--overlap", "--mem=0", "-N1", "-n1", f"--nodelist={first}"]
        assert output(*step, "printenv", "SLURMD_NODENAME") == first
        output("scontrol", "update", f"nodename={second}", "state=drain", "reason=test")
        assert slurm.states()[second].startswith("dr")
    finally:
        output("scancel", job)
        slurm.revive_node(second)
    output("scontrol", "update", f"nodename={second}", "state=resume")
    wait_for(lambda: set(slurm.states().values()) == {"idle"})


def test_up_twice_finds_the_same_cluster(slurm: cluster.Cluster) -> None:
    before = slurm.daemons()
    output("scontrol", "update", f"nodename={slurm.nodes[0]}", "state=drain", "reason=test")

    again = cli("up", "--dir", slurm.folder)

    assert again.returncode == 0, again.stderr
    assert again.stdout == f"export SLURM_CONF={slurm.folder}/slurm.conf\n"
    assert "is up already" in again.stderr
    assert slurm.daemons() == before
    assert slurm.states()[slurm.nodes[0]] in cluster.USABLE, "the drained node is resumed"


@pytest.mark.soak  # of the tests' own cluster
def test_half_up_is_swept_away_and_down_leaves_nothing(
    slurm: cluster.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second cluster beside the first: brought up, crippled, brought up again, taken down with a job on it."""
    first_try = cluster.up(folder, nodes=1)
    killed = first_try.daemons()["mariadbd"]
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: first_try.daemons()["mariadbd"] is None)
    assert cli("status", "--dir", folder).returncode == 1

    second = cluster.up(folder, nodes=1, slurmd_timeout=3)
    assert not second.was_up
    assert second.states() == {"gpu001": "idle"}
    second.kill_node("gpu001")
    wait_for(lambda: second.states()["gpu001"] == "down*")  # slurmctld looks every 15 s or so
    second.revive_node("gpu001")
    wait_for(lambda: second.states() == {"gpu001": "idle"})
    env = {**os.environ, **second.env}
    subprocess.run(
        ["sbatch", "--output=/dev/null", "--wrap", "sleep 60"], env=env, check=True, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: any(process[2] == "sleep" for process in cluster.processes_of(folder)))
    assert len(processes_in(folder)) >= 5

    # As `make slurm-down`: also what the worker of a run had that was killed, and where the folder is gone already.
    left = folder.with_name(f"{folder.name}-gw7-1")
    left.mkdir()
    (left / "slurm.conf").write_text(cluster.HEADER)
    shutil.rmtree(folder)
    monkeypatch.setattr(cluster, "FOLDER", folder)
    monkeypatch.setattr(sys, "argv", ["cluster.py", "down"])
    assert cluster.main() == 0
    assert capsys.readouterr().err == f"2 clusters ended: {folder.name}, {left.name}\n"
    assert not left.exists()
    assert not folder.exists()
    assert list(cluster.processes_of(folder)) == []
    assert processes_in(folder) == []
    assert all(slurm.daemons().values()), "the other cluster is not touched"


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for command in (cluster.down, cluster.load):
        with pytest.raises(cluster.ClusterError, match="left alone"):
            command(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_what_is_missing_is_said_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["cluster.py", "up"])

    assert cluster.main() == 69

    said = capsys.readouterr().err
    assert "not root" in said
    assert "apt-get install -y --no-install-recommends mariadb-server munge slurm-wlm slurmdbd" in said


def test_a_daemon_that_does_not_start_is_named_with_its_log(
    slurm: cluster.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SLURMDBD_CONF", cluster.SLURMDBD_CONF + "NoSuchSetting=1\n")
    with pytest.raises(cluster.ClusterError, match=r"(?s)^slurmdbd has ended .*NoSuchSetting"):
        cluster.up(folder, nodes=1)
    assert list(cluster.processes_of(folder)) == []
    assert (folder / "slurmdbd" / "log").exists(), "the logs are kept for reading"
