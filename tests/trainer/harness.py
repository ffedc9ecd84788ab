"""Ranks for tests: processes that form a gloo group for one function, and ``python -m trainer`` for whole runs."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# A model of 35 thousand parameters: a step takes milliseconds.
SMALL = (
    "model.vocab_size=512",
    "model.max_positions=32",
    "model.num_layers=2",
    "model.hidden_size=32",
    "data.seq_len=32",
    "data.global_batch=8",
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _as_rank(work: Callable[..., Any], rank: int, world: int, port: int, args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    os.environ.update(environment(rank, world, port))
    try:
        return work(*args)
    finally:
        # Also after an error: the others then see the connection close and do not wait for ever.
        if dist.is_initialized():
            dist.destroy_process_group()


class Ranks:
    """Runs a function in several processes at once. They come from a server that has imported torch already.

    A process keeps its rank, because DTensor remembers the offsets of shards for the life of a process.
    """

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trainer.loop", "torch._dynamo"])
        self._processes = [ProcessPoolExecutor(1, mp_context=context) for _ in range(most)]

    def __call__(self, world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(*args)`` returns on each of ``world`` ranks."""
        port = free_port()
        futures = [
            process.submit(_as_rank, work, rank, world, port, args)
            for rank, process in enumerate(self._processes[:world])
        ]
        done, _ = wait(futures, timeout=120, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # the error that came first, not those that followed from it
        return [future.result(timeout=0) for future in futures]

    def close(self) -> None:
        for process in self._processes:
            process.shutdown(cancel_futures=True)


def start(world: int, *args: str | Path, **variables: str) -> list[subprocess.Popen[str]]:
    """Start ``python -m trainer`` on ``world`` ranks; world 0 means alone, without any rank's variables."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if name not in environment(0, 1, 0)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", *map(str, args)],
            cwd=REPOSITORY,
            env=clean | (environment(rank, world, port) if world else {}) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world or 1)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all of them."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def train(world: int, *args: str | Path, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run ``python -m trainer`` on ``world`` ranks to its end."""
    return finish(start(world, *args, **variables))


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def telemetry(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "telemetry.jsonl").read_text().splitlines()]
