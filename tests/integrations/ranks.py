"""Starts ranks of a script in processes of their own. They are forked from one that has imported what it needs."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import Forks
from tests.ports import free_port

PATIENCE = 240.0

_TORCH = ("torch", "torch._dynamo", "torch.distributed.fsdp", "opt_ops.integrations.rank")
_FORKS = {
    "loop.py": Forks(*_TORCH),
    "lit.py": Forks(*_TORCH, "lightning.pytorch"),
    "hf_script.py": Forks(*_TORCH, "transformers.trainer", "accelerate"),
}
"""By script: where its ranks come from."""


def _run(script: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Ranks:
    """The ranks of an attempt."""

    def __init__(self, folder: Path, script: Path, arguments: list[str], world: int = 1) -> None:
        port = free_port()
        self.folder = folder
        self.processes = []
        for rank in range(world):
            environment: dict[str, str] = {}
            if world > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            log = str(folder / f"rank-{rank}.log")
            target = (str(script), arguments, environment, str(folder), log)
            process = _FORKS[script.name].Process(target=_run, args=target)
            _FORKS[script.name].start(process)
            self.processes.append(process)

    def codes(self, seconds: float = PATIENCE) -> list[int | None]:
        """Wait for the end of all ranks; their exit codes. A rank that does not end has None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.end()
        return codes

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def log(self, rank: int = 0) -> str:
        path = self.folder / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""


class Attempts:
    """Attempts of a run in one folder."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder, self.script = folder, script
        self.checkpoints = folder / "checkpoints"
        self.fence = folder / "attempt.json"
        self._started: list[Ranks] = []

    def start(self, name: str, *arguments: str, world: int = 1, resume: int | None = None) -> Ranks:
        """Start an attempt; ``resume``: the step of the checkpoint."""
        self.fence.write_text(json.dumps({"attempt": name}))
        (self.folder / name).mkdir()
        begin = ["--from-scratch"] if resume is None else ["--resume", str(self.checkpoints / f"step-{resume:08d}")]
        options = ["--recipe", "x", "--run-dir", str(self.folder / name / "run"), "--attempt", name, *begin]
        options += ["--checkpoint-dir", str(self.checkpoints), "--fence", str(self.fence)]
        self._started.append(Ranks(self.folder / name, self.script, [*options, *arguments], world))
        return self._started[-1]

    def run(self, name: str, *arguments: str, world: int = 1, resume: int | None = None, code: int = 0) -> list[dict]:
        """Run an attempt to its end, and return its telemetry."""
        ranks = self.start(name, *arguments, world=world, resume=resume)
        codes = ranks.codes()
        assert codes == [code] * world, (codes, [ranks.log(rank) for rank in range(world)])
        return self.lines(name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "run" / "telemetry.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def committed(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.checkpoints.glob("step-*/COMMITTED"))

    def end(self) -> None:
        for ranks in self._started:
            ranks.end()


def until(true: Callable[[], Any], ranks: Ranks) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        alive = [process.is_alive() for process in ranks.processes]
        logs = [ranks.log(rank) for rank in range(len(alive))]
        assert all(alive), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)
