"""What peer copies cost a step: opt-tiny with and without copies after every update, in turn, in the same processes.

    python -m benchmarks.peer_copies                    (two ranks, about 20 seconds)
    python -m benchmarks.peer_copies --ranks 4 -o json

All ranks are on this host, each with one thread, as two nodes. A round is a number of steps with copies and the same
number without; the order changes from round to round. The steps are the trainer's own: guard, norms and telemetry's
measurements included, evaluation and checkpoints not. The time of a round is that of all ranks together. Shown are
medians over rounds, and CPU seconds of all ranks beside them, because a shared machine is not quiet: there the CPU
seconds count.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.train_step import Bytes
from opt_ops.contract.environment import Place
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from tests.ports import free_port
from trainer import recipes
from trainer.checkpoint.peer_copies import PeerCopies, local_tensors
from trainer.checkpoint.schedule import SaveSchedules
from trainer.checkpoint.versions import size_of
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import Steps

WARMUP = 20  # steps


class Rank:
    """One rank, which trains on and on."""

    def __init__(self, recipe: Recipe, rank: int, ranks: int, folder: Path) -> None:
        self._engine: Engine = build(recipe, mesh.start(Place(rank, ranks, rank), ranks, 1))
        layout = self._engine.layout
        inputs = RankInputs(Outside(Options(run_dir=folder), rank), layout, SaveSchedules(recipe, snapshots=False))
        checksums = Checksums(self._engine.model, self._engine.optimizer, layout, recipe.checksum_every)
        self._guard, samples = Guard(recipe), Bytes(recipe.data.seq_len)
        self._steps = Steps(recipe, (), (), self._engine, samples, self._guard, inputs, checksums)
        self._progress = Progress()
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        tensors = local_tensors(self._engine.state())
        nodes = [f"n{2 * each // ranks}" for each in range(ranks)]
        self._copies, self.size = PeerCopies(tensors, nodes, group, 1), size_of(tensors)

    def run(self, steps: int, *, copied: bool) -> tuple[float, float]:
        """Take steps. Returns the wall seconds and the CPU seconds of one."""
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._progress = self._steps.take(self._progress).progress
            if copied:
                self._copies.keep(self._progress.step, {"guard": self._guard.state(), "step": self._progress.step})
        self._copies.wait()
        dist.barrier()
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def _serve(rank: int, ranks: int, port: int, rounds: int, steps: int, folder: str, results: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    recipe = recipes.build("opt-tiny", ["optim.schedule=constant"])
    each = Rank(replace(recipe, steps=10**9), rank, ranks, Path(folder))
    each.run(WARMUP, copied=True)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(rounds):
        for copied in (True, False) if number % 2 else (False, True):
            found[copied].append(each.run(steps, copied=copied))
    results.send((each.size, found))
    dist.destroy_process_group()


def measure(ranks: int, rounds: int, steps: int) -> dict[str, Any]:
    """The medians over all rounds."""
    forks, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        pipes = [forks.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            forks.Process(target=_serve, args=(rank, ranks, port, rounds, steps, folder, pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        told = [pipe.recv() for pipe, _ in pipes]
        for process in processes:
            process.join()

    def seconds(copied: bool, index: int) -> list[float]:
        """By round: the wall seconds of a step, or the CPU seconds of all ranks."""
        by_rank = [[each[index] for each in found[copied]] for _, found in told]
        return [sum(row) if index else max(row) for row in zip(*by_rank, strict=True)]

    def share(index: int) -> float:
        """The median over rounds of what copies add."""
        return statistics.median(a / b - 1 for a, b in zip(seconds(True, index), seconds(False, index), strict=True))

    return {
        "ranks": ranks,
        "rounds": rounds,
        "steps": 2 * rounds * steps,
        "copy_bytes_per_rank": [size for size, _ in told],
        "step_seconds_without": statistics.median(seconds(False, 0)),
        "step_seconds_with": statistics.median(seconds(True, 0)),
        "overhead": share(0),
        "cpu_seconds_without": statistics.median(seconds(False, 1)),
        "cpu_seconds_with": statistics.median(seconds(True, 1)),
        "cpu_overhead": share(1),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12, help="of steps with and without copies")
    parser.add_argument("--steps", type=int, default=10, help="of each kind in a round")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    found = measure(options.ranks, options.rounds, options.steps)
    if options.output == "json":
        print(json.dumps(found, indent=1))
        return
    for kind, unit in (("step_seconds", "wall"), ("cpu_seconds", "CPU of all ranks")):
        without, with_ = 1000 * found[f"{kind}_without"], 1000 * found[f"{kind}_with"]
        share = found["overhead" if kind == "step_seconds" else "cpu_overhead"]
        print(f"{without:7.2f} ms without copies, {with_:7.2f} ms with: {share:+.1%} ({unit})")
    print(f"{max(found['copy_bytes_per_rank']) / 1e6:.2f} MB a rank and step; load {found['load']:.1f}")


if __name__ == "__main__":
    main()
