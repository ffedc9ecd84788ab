"""`opt-ops run watch-job` beside a real Slurm: jobs that hang and die, and a proof that nothing is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops import playbook_loader
from opt_ops.core.values import Driver, Status
from opt_ops.runfolder import lineages
from tests.slurm import cluster
from tests.slurm.day import ask, until

pytestmark = pytest.mark.slurm

SCRIPT = """#!/bin/sh
#SBATCH --output=log-%j.txt
for step in $(seq 1 60); do echo "iter $step: loss 3.$((9999 - 50 * step)), time 50.00ms, mfu 25.62%"; sleep 0.05; done
{then}
"""

NOTING = """#!/bin/sh
echo "$(basename $0) $*" >> {calls}
exec {real} "$@"
"""


def submitted(folder: Path, then: str) -> str:
    (folder / "train.sh").write_text(SCRIPT.format(then=then))
    return subprocess.check_output(["sbatch", "--parsable", "train.sh"], cwd=folder, text=True).strip()


def noted(folder: Path) -> Path:
    """Slurm's commands in a folder of their own, each noting how it was called."""
    (folder / "bin").mkdir()
    for name in ("scontrol", "squeue", "sacct", "sinfo", "scancel", "sbatch", "srun", "salloc", "sacctmgr", "sattach"):
        if real := shutil.which(name):
            file = folder / "bin" / name
            file.write_text(NOTING.format(calls=folder / "calls", real=real))
            file.chmod(0o755)
    return folder / "bin"


def watch(folder: Path, job: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "opt_ops", "run", "watch-job", job, "-o", "jsonl"]
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def test_jobs_that_hang_and_die(slurm: cluster.Cluster, tmp_path: Path):
    books = tmp_path / "books"
    shutil.copytree(playbook_loader.folder(), books)
    hang = books / "hang.md"
    short = {"floor_seconds = 30.0": "floor_seconds = 8.0", "startup_seconds = 900.0": "startup_seconds = 60.0"}
    for shipped, here in short.items():  # a watch that begins late reads the log at once, and knows no pace
        assert shipped in hang.read_text()
        hang.write_text(hang.read_text().replace(shipped, here))
    (tmp_path / "opt-ops.toml").write_text('playbooks = "books"\n')
    path = noted(tmp_path)

    job = submitted(tmp_path, "kill -STOP $$")
    watching = watch(tmp_path, job, path)
    runs = tmp_path / "runs"
    until(lambda: watching.poll() is not None or (runs / "1/journal").exists())
    assert watching.poll() is None
    until(lambda: any(each.signal == "hang" for each in lineages.state(runs / "1").signals.values()))
    assert lineages.state(runs / "1").driver is Driver.SHADOW
    ask("scancel", "--signal=KILL", "--full", job)
    ask("scancel", job)
    output, _ = watching.communicate(timeout=300)
    assert watching.returncode == 5
    assert '"hang"' in output
    assert f"job {job} is RUNNING" in output
    state = lineages.state(runs / "1")
    assert state.attempt.last_step == 60
    assert state.status in (Status.HALTED, Status.CANCELLED)

    job = submitted(tmp_path, "echo 'torch.OutOfMemoryError: CUDA out of memory.'; exit 1")
    watching = watch(tmp_path, job, path)
    output, _ = watching.communicate(timeout=300)
    assert watching.returncode == 5
    assert '"out_of_memory"' in output
    assert f"job {job} ended FAILED (exit code 1) at step 60" in output

    words = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert {tuple(each[:2]) for each in words} <= {
        ("scontrol", "show"),
        ("sacct", "-n"),
        ("squeue", "-h"),
        ("sinfo", "-h"),
    }
    left = {each.name for each in tmp_path.iterdir()}
    logs = {f"log-{number}.txt" for number in (job, str(int(job) - 1))}
    assert left == {"books", "opt-ops.toml", "bin", "calls", "runs", "train.sh"} | logs
