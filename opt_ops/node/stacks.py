"""Asks ranks for the stacks of their threads, and collects them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_ops.node.process_groups import RankProcess, catches
from opt_ops.node.rank_start import PIPE

DUMP_SECONDS = 3.0  # for ranks to write their stacks
PY_SPY_SECONDS = 5.0  # for py-spy to read the stacks of ranks that did not answer


def dump(folder: Path, alive: Mapping[int, RankProcess]) -> dict[str, Any]:
    """Ask the ranks for their stacks (SIGUSR2), and collect them. py-spy, if installed, reads those of the others.

    If the ranks use NCCL's flight recorder, it writes its own files beside.

    Args:
        folder: where ranks write their stacks.
        alive: the processes that run, by rank.
    """
    files = {rank: folder / f"rank-{rank:04d}.txt" for rank in alive}
    sizes = {rank: _size(path) for rank, path in files.items()}
    for rank, process in alive.items():
        _request_trace(Path(f"{folder / PIPE}{rank}.pipe"))
        if catches(process.pid, signal.SIGUSR2):
            os.kill(process.pid, signal.SIGUSR2)
    stacks: dict[str, str] = {}
    deadline = time.monotonic() + DUMP_SECONDS
    while len(stacks) < len(alive) and time.monotonic() < deadline:
        time.sleep(0.1)
        for rank, path in files.items():
            if str(rank) not in stacks and _size(path) > sizes[rank]:
                time.sleep(0.05)  # until its last thread is written
                stacks[str(rank)] = path.read_text(encoding="utf-8", errors="replace")[-65536:]
    others = _py_spy({str(rank): process.pid for rank, process in alive.items() if str(rank) not in stacks})
    return {"v": 1, "stacks": stacks, "py_spy": others}


def _request_trace(pipe: Path) -> None:
    """Any byte in the pipe requests a dump. Without NCCL the pipe is missing or has no reader; that is not an error."""
    with suppress(OSError):
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _py_spy(pids: dict[str, int]) -> dict[str, str]:
    """Read the stacks of processes with py-spy; empty where it is not installed.

    All are read at once: the agent sends no heartbeat meanwhile, and a node that is silent for long counts as lost.
    """
    program = shutil.which("py-spy")
    if program is None:
        return dict.fromkeys(pids, "")
    running = {
        rank: subprocess.Popen(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        for rank, pid in pids.items()
    }
    deadline = time.monotonic() + PY_SPY_SECONDS
    return {rank: _answer(spy, deadline) for rank, spy in running.items()}


def _answer(spy: subprocess.Popen[str], deadline: float) -> str:
    try:
        return spy.communicate(timeout=max(0.0, deadline - time.monotonic()))[0][-65536:]
    except subprocess.TimeoutExpired:
        spy.kill()
        return ""
