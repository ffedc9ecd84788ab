"""Deduplication as jobs of Slurm: the same bytes as on one machine, whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.trainer.test_dedup import Corpus, bytes_of, write
from trainer.data.dedup.run import run
from trainer.data.dedup.work import Options
from trainer.data.tokens import builder

from .conftest import quiet
from .day import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cluster import Cluster

pytest.importorskip("rensa")
pytest.importorskip("datatrove")

SLURM = {"partition": "main", "time": "10", "mem": "500"}
PROGRAM = """
import sys
from pathlib import Path
from trainer.data.tokens import builder
builder.PIECE = 150_000
from trainer.data.dedup.run import run
from trainer.data.dedup.work import Options
options = Options(inputs=(Path("in"),), out=Path("out"), engine="datatrove", slurm={slurm})
run(options, lambda line: print(line, flush=True))
"""


@pytest.fixture
def corpus(tmp_path: Path, slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a blank in its name, a corpus of three pieces in it, and what rensa makes of them."""
    folder = tmp_path / "a folder"
    texts = [text for _, text in Corpus(7).families(60).documents]
    write(folder / "in/a.jsonl", texts[:100])
    write(folder / "in/b.jsonl", texts[100:])
    monkeypatch.setattr(builder, "PIECE", 150_000)
    monkeypatch.chdir(folder)
    run(Options(inputs=(Path("in"),), out=Path("expected")))
    yield folder
    quiet(slurm)


def kill_task(job: str, index: int | None = None) -> bool:
    """Kill the Python of a task of the job, of that index if one is given; whether there was one."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(line.partition("=")[::2] for line in (entry / "environ").read_text().split("\0"))
            command = (entry / "cmdline").read_bytes()
        except (OSError, UnicodeDecodeError):
            continue
        wanted = environment.get("SLURM_ARRAY_JOB_ID") == job and b"launch_pickled_pipeline" in command
        if wanted and index in (None, int(environment["SLURM_ARRAY_TASK_ID"])) and b"bash" not in command:
            os.kill(int(entry.name), signal.SIGKILL)
            return True
    return False


class Killer:
    """Listens to the progress, and kills a task of the jobs of a stage."""

    def __init__(self, stage: str, index: int | None, times: int) -> None:
        self.stage, self.index, self.times = stage, index, times
        self.told: list[str] = []

    def __call__(self, line: str) -> None:
        self.told.append(line)
        if self.times and line.startswith(f"{self.stage}: job "):
            self.times -= 1
            threading.Thread(target=self._kill, args=(line.split()[2],), daemon=True).start()

    def _kill(self, job: str) -> None:
        while not kill_task(job, self.index):
            pass


def without_report(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in bytes_of(folder).items() if name != "dedup.json"}


def test_a_command_that_is_killed_waits_for_its_jobs_again_and_a_killed_task_is_done_again(corpus: Path):
    place = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(slurm=SLURM)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": place},
    ) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        child.kill()
    assert first.startswith("signatures: job "), first
    killer = Killer("buckets", 1, 1)
    run(Options(inputs=(Path("in"),), out=Path("out"), engine="datatrove", slurm=SLURM), killer)
    assert not any(line.startswith("signatures: job ") for line in killer.told), "it waits for the job that is there"
    assert any("tasks ended without a result" in line and "Killed" in line for line in killer.told), killer.told
    assert without_report(corpus / "out") == without_report(corpus / "expected")
    assert not ask("squeue", "-h"), "nothing is left in the queue"


def test_a_task_that_always_ends_is_told_with_its_log_and_what_is_finished_is_kept(corpus: Path, slurm: Cluster):
    options = Options(inputs=(Path("in"),), out=Path("out"), engine="datatrove", slurm={})
    killer = Killer("signatures", 0, 3)
    with pytest.raises(ChildProcessError, match=r"signatures: [12] of 3 tasks (.|\n)*Killed(.|\n)*tried 3 times"):
        run(options, killer)
    assert not Path("out").exists()
    again: list[str] = []

    def without_controller(line: str) -> None:
        again.append(line)
        if line.startswith("buckets: job "):
            slurm.stop("slurmctld")
        elif "squeue failed" in line:
            slurm.start("slurmctld")

    run(options, without_controller)
    assert any("squeue failed, and is asked again" in line for line in again), again
    assert any(line.startswith("signatures: job ") and "for 3 tasks" not in line for line in again), again
    assert without_report(corpus / "out") == without_report(corpus / "expected")
