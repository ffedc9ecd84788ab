"""Ranks for tests: processes that form a gloo group for one function, and ``python -m trainer`` for whole runs."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.forks import Forked
from tests.ports import free_port
from tests.trainer.forked import FORKS

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


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _serve(rank: int, requests: Connection) -> None:
    """Do what is asked, for as long as somebody asks."""
    import torch.distributed as dist

    while True:
        try:
            work, args, world, port = requests.recv()
        except EOFError:
            return
        os.environ.update(environment(rank, world, port))
        try:
            outcome = work(*args), None
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller hears of it
            error.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
            outcome = None, error
        if dist.is_initialized():
            dist.destroy_process_group()
        requests.send(outcome)


class Ranks:
    """Runs a function in several processes at once. They come from a server that has imported torch already.

    A process keeps its rank, because DTensor remembers the offsets of shards for the life of a process.

    Args:
        patience: seconds that a call may take.
    """

    def __init__(self, patience: float = 600) -> None:
        self._patience = patience
        self._processes: list[tuple[Any, Connection]] = []

    def __call__(self, world: int, work: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        """What ``work(*args, **named)`` returns on each of ``world`` ranks, or the first error that one raises."""
        while len(self._processes) < world:
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(len(self._processes), theirs), daemon=True)
            FORKS.start(process)
            theirs.close()
            self._processes.append((process, ours))
        pipes = [pipe for _, pipe in self._processes[:world]]
        port = free_port()
        for pipe in pipes:
            pipe.send((partial(work, *args, **named), (), world, port))
        results: dict[Connection, Any] = {}
        deadline = time.monotonic() + self._patience
        while waiting := [pipe for pipe in pipes if pipe not in results]:
            ready = wait(waiting, timeout=deadline - time.monotonic())
            for pipe in ready:
                results[pipe], error = pipe.recv()
                if error:
                    self.close()  # the others may wait for this one for ever
                    raise error
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {[pipes.index(pipe) for pipe in waiting]} have not finished")
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self._processes:
            process.kill()
            process.join()
            pipe.close()
        self._processes.clear()


def engine_of(recipe: Any) -> Any:
    """The recipe's engine with a fresh model, on one rank of a group; the environment says which."""
    from opt_ops.contract.environment import place_from_environment
    from trainer.parallel import mesh
    from trainer.parallel.build import build

    place = place_from_environment(os.environ)
    layout = mesh.start(place, *mesh.check_layout(recipe, place.world), recipe.parallel.replicas)
    return build(recipe, layout)


Rank = subprocess.Popen[str] | Forked


def start(
    world: int, *args: str | Path, fresh: Collection[int] | None = None, ignored: Sequence[int] = (), **variables: str
) -> list[Rank]:
    """Start ``python -m trainer`` on ``world`` ranks; world 0 means alone, without any rank's variables.

    Ranks that are ``fresh`` are new interpreters, and inherit signals that are blocked here. If none are named, all
    with variables of their own are, since modules may read them when they are imported. Others ignore ``ignored``.
    """
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if name not in environment(0, 1, 0)}
    words = [str(arg) for arg in args]
    ranks: list[Rank] = []
    for rank in range(world or 1):
        own = clean | (environment(rank, world, port) if world else {}) | variables
        new = rank in fresh if fresh is not None else bool(variables)
        ranks.append(_interpreter(words, own) if new else FORKS.run("trainer", words, REPOSITORY, own, ignored))
    return ranks


def _interpreter(words: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-m", "trainer", *words], subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=pipe, stderr=pipe, text=True)


def finish(processes: Sequence[Rank]) -> list[subprocess.CompletedProcess[str]]:
    """Wait for all of them."""
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=600)
            results.append(subprocess.CompletedProcess(process.args, process.returncode or 0, out, err))
    finally:
        for process in processes[len(results) :]:
            process.kill()
            process.communicate()
    return results


def train(world: int, *args: str | Path, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run ``python -m trainer`` on ``world`` ranks to its end."""
    return finish(start(world, *args, **variables))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.005)


def waits(process: Rank) -> bool:
    """Whether all threads of a process sleep, and nothing wakes them for a moment."""

    def threads() -> list[tuple[str, ...]]:
        # state, and how long each has computed, in user mode and in the kernel
        texts = [path.read_text() for path in sorted(Path(f"/proc/{process.pid}/task").glob("*/stat"))]
        return [(words[0], words[11], words[12]) for words in (text.rpartition(")")[2].split() for text in texts)]

    before = threads()
    time.sleep(0.2)
    return before == threads() and {state for state, *_ in before} == {"S"}


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def telemetry(run_dir: Path) -> list[dict[str, Any]]:
    whole = (run_dir / "telemetry.jsonl").read_text().rpartition("\n")[0]  # the last line may be half written
    return [json.loads(line) for line in whole.splitlines()]
