"""Seconds that a checkpoint holds up training, takes in the background, and takes to load: ours beside PyTorch's own.

    python -m benchmarks.checkpoint --rounds 5                       (CPU, a model of 36 million parameters)
    python -m benchmarks.checkpoint --recipe opt-1.3b --rounds 5     (one GPU)

| contender | what it is |
| --- | --- |
| ours, durable | staged into shared memory, written by the writer, hashed, committed; loading verifies every byte |
| ours, snapshot | the same, onto a node's disk; one node, so no copy on a peer |
| DCP, synchronous | torch.distributed.checkpoint.save, load |
| DCP, asynchronous, thread | async_save, which stages into memory that it keeps between saves, and writes in a thread |
| DCP, asynchronous, process | async_save with a process of its own |

Each has a process of its own, one after the other, and saves the same state: parameters, moments and step counts of one
rank, as FSDP2 shards them. *Stall* is how long the call takes; *background* from there until the checkpoint is
complete. The first save is listed apart: it allocates memory and starts processes. DCP neither hashes nor verifies.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from opt_ops.contract import manifest
from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.fence import Fence
from trainer import recipes
from trainer.checkpoint import Checkpointer, Destination, Writer
from trainer.parallel import mesh
from trainer.parallel.build import build

CONTENDERS = {
    "durable": "ours, durable",
    "snapshot": "ours, snapshot",
    "sync": "DCP, synchronous",
    "thread": "DCP, asynchronous, thread",
    "process": "DCP, asynchronous, process",
}
SMALL = ("model.num_layers=4", "model.hidden_size=768", "model.num_heads=12", "model.vocab_size=10000")


class Ours:
    """Our checkpointer, to one place."""

    def __init__(self, writer: Writer, folder: Path, state: dict[str, Any], host: Any, *, durable: bool) -> None:
        to = Destination(
            folder=folder / "1.00", node="n1", fence=Fence(None, "a1"), disk=None if durable else folder / "disk"
        )
        self._checkpointer = Checkpointer(writer, to, state, "127.0.0.1", host)
        self._path = lambda step: (manifest.step_folder if durable else manifest.snapshot_folder)(to.folder, step)
        self._durable = durable

    def save(self, step: int) -> None:
        """Begin to save; return when training could go on."""
        header = {"step": step, "attempt": "a1", "ts": time.time(), "layout": {"world": 1}, "telemetry": {}}
        self._checkpointer.save(header | {"data_position": 0, "tokens": 0, "settings_digest": ""}, self._durable)

    def wait(self) -> None:
        """Wait until it is complete."""
        if not self._checkpointer.finish():
            raise RuntimeError(self._checkpointer.take_error())

    def load(self, step: int) -> None:
        """Read it back."""
        self._checkpointer.load(self._path(step))


class Theirs:
    """PyTorch's own ways to save."""

    def __init__(self, folder: Path, state: dict[str, Any], host: Any, kind: str) -> None:
        self._folder, self._state, self._host, self._kind = folder, state, host, kind
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self._future: Any = None

    def save(self, step: int) -> None:
        """Begin to save; return when training could go on."""
        target = str(self._folder / str(step))
        if self._kind == "sync":
            dcp.save(self._state, checkpoint_id=target)
            return
        process = self._kind == "process"
        self._future = dcp.async_save(
            self._state,
            checkpoint_id=target,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD,
            async_stager=self._stager,
            process_group=self._host,
        )

    def wait(self) -> None:
        """Wait until it is complete."""
        if self._future is not None:
            self._future.result()

    def load(self, step: int) -> None:
        """Read it back."""
        dcp.load(self._state, checkpoint_id=str(self._folder / str(step)))


def contend(kind: str, recipe_name: str, settings: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """One contender's seconds; runs in a process of its own."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    writer = Writer() if kind in ("durable", "snapshot") else None
    recipe = recipes.build(recipe_name, settings)
    place = place_from_environment(os.environ)
    built = build(recipe, mesh.start(place, 1, 1))
    state = built.state()
    parameters = [t for group in state.values() for t in _tensors(group)]
    if writer:
        saver: Ours | Theirs = Ours(writer, folder, state, built.layout.host, durable=kind == "durable")
    else:
        saver = Theirs(folder, state, built.layout.host, kind)
    stall, background, load = [], [], []
    for step in range(1, rounds + 2):
        for tensor in parameters:
            tensor.add_(1)  # another state to save
        _synchronise()
        begin = time.perf_counter()
        saver.save(step)
        called = time.perf_counter()
        saver.wait()
        stall.append(called - begin)
        background.append(time.perf_counter() - called)
    for _ in range(min(rounds, 3)):
        _synchronise()
        begin = time.perf_counter()
        saver.load(rounds + 1)
        _synchronise()
        load.append(time.perf_counter() - begin)
    size = sum(t.numel() * t.element_size() for t in parameters)
    return {"first": stall[0], "stall": stall[1:], "background": background[1:], "load": load, "bytes": size}


def _tensors(group: dict[str, Any]) -> list[torch.Tensor]:
    values = [v for each in group.values() for v in (each.values() if isinstance(each, dict) else [each])]
    return [getattr(v, "to_local", lambda v=v: v)().detach() for v in values if isinstance(v, torch.Tensor)]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Let all contend, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="opt-125m")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--only", choices=CONTENDERS)
    arguments = parser.parse_args()
    settings = arguments.set or ([] if torch.cuda.is_available() else list(SMALL))
    if arguments.only:
        print(json.dumps(contend(arguments.only, arguments.recipe, settings, arguments.rounds, arguments.folder)))
        sys.stdout.flush()
        os._exit(0)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {arguments.recipe} {' '.join(settings)}")
    print("\n| | first stall, s | stall, s, median (range) | background, s, median | load, s, median |")
    print("| --- | ---: | ---: | ---: | ---: |")
    size = 0
    for kind, name in CONTENDERS.items():
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        command = [sys.executable, "-m", "benchmarks.checkpoint", "--only", kind, "--recipe", arguments.recipe]
        command += ["--rounds", str(arguments.rounds), "--folder", str(folder)]
        command += [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
        shutil.rmtree(folder)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:120]} | | | |")
            continue
        got = json.loads(done.stdout.strip().splitlines()[-1])
        size, stall = got["bytes"], got["stall"]
        print(
            f"| {name} | {got['first']:.3f} | {statistics.median(stall):.3f} ({min(stall):.3f}–{max(stall):.3f}) | "
            f"{statistics.median(got['background']):.2f} | {statistics.median(got['load']):.2f} |",
            flush=True,
        )
    print(f"\n{size / 1e6:,.0f} MB of state.")


if __name__ == "__main__":
    main()
