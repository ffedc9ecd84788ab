"""The burn-in of nodes: processes on this machine or under srun, with JSON lines as requests and answers.

`python -m trainer.burn_in` is the other side. It stays alive between rounds, because the start of Python, torch and a
GPU takes longer than a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest, tolerance_of
from opt_ops.core.health.burn_in_plan import Group, GroupMeasurement, next_round
from opt_ops.node.line_process import own_stdout, parsed

COMMAND = (sys.executable, "-m", "trainer.burn_in")
GROUP_SECONDS = 6.0  # for a group to connect and to measure
_ENDS = ((subprocess.Popen.poll, 2.0), (subprocess.Popen.terminate, 1.0), (subprocess.Popen.kill, 1.0))
LEAVING_SECONDS = 4.0  # to end ranks that do not exit by themselves
_STARTING_SECONDS = 10.0  # to read NVML before the burn-in
_SLACK_SECONDS = 2.0  # beyond GROUP_SECONDS; a rank without an answer by then hangs


def on_this_machine(nodes: Sequence[str], ranks: int, *options: str) -> list[list[str]]:
    """Return a command for each rank, with this machine as all of the nodes."""
    host = "127.0.0.1" if len(nodes) > 1 else socket.gethostname()
    return [
        [*COMMAND, "--node", node, "--local-rank", str(local), "--host", host, *options]
        for node in nodes
        for local in range(ranks)
    ]


def by_srun(job: str, nodes: Sequence[str], ranks: int, *options: str) -> list[list[str]]:
    """Return one srun command for all ranks, inside a job that holds the nodes, beside what else runs there."""
    where = [f"--jobid={job}", "--overlap", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
    how = [f"--ntasks-per-node={ranks}", "--kill-on-bad-exit=0", "--quiet"]
    return [["srun", *where, *how, *COMMAND, *options]]


class BurnInRanks:
    """The rank processes of a burn-in, and their lines."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        # One thread each: without GPUs, ranks would compete for the cores and look slow.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._buffers: dict[int, bytes] = {}
        for command in commands:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
            self._selector.register(process.stdout, selectors.EVENT_READ)
            self._processes.append(process)

    def send(self, order: Mapping[str, Any]) -> None:
        """Send the same line to all ranks."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, and its missing answer will show that
                process.stdin.write((json.dumps(order) + "\n").encode())
                process.stdin.flush()

    def receive(self, wanted: int, until: float, that: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return lines that match `that`, until there are enough, the time is over, or all ranks have ended."""
        received: list[dict[str, Any]] = []
        while len(received) < wanted and self._selector.get_map() and (left := until - time.monotonic()) > 0:
            received += [line for line in self._lines(left) if that(line)]
        return received

    def _lines(self, seconds: float) -> Iterator[dict[str, Any]]:
        for key, _ in self._selector.select(seconds):
            chunk = os.read(key.fd, 1 << 16)
            if not chunk:
                self._selector.unregister(key.fileobj)
                continue
            *lines, rest = (self._buffers.get(key.fd, b"") + chunk).split(b"\n")
            self._buffers[key.fd] = rest
            for line in lines:
                with suppress(ValueError):  # output of a library on stdout
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        # SIGTERM before SIGKILL: srun ends its tasks with it.
        for end, seconds in _ENDS:
            deadline = time.monotonic() + seconds
            left = [process for process in self._processes if process.poll() is None]
            for process in left:
                end(process)
            for process in left:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.close()
        self._selector.close()


def burn_in(commands: Sequence[Sequence[str]], nodes: Sequence[str], ranks: int, seconds: float) -> BurnIn:
    """Start the ranks, test every device, then all-reduce within and between nodes until the slow nodes are known.

    Args:
        commands: The commands that start the ranks.
        nodes: The names of the nodes, as the ranks report them.
        ranks: Number of ranks on each node.
        seconds: Time limit for new rounds. A round that runs then takes `GROUP_SECONDS` at most.
    """
    until = time.monotonic() + seconds
    started = BurnInRanks(commands)
    try:
        return _run(started, nodes, ranks, until)
    finally:
        started.close()


class InBackground:
    """The burn-in of this node alone, in a process of its own."""

    def __init__(self, node: str, seconds: float) -> None:
        self._node = node
        self._until = time.monotonic() + seconds + GROUP_SECONDS + LEAVING_SECONDS + _STARTING_SECONDS
        command = [sys.executable, "-m", "opt_ops.node", "burn-in", "--node", node, "--seconds", str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def found(self) -> dict[str, Any] | None:
        """Return the result as JSON values; None while it runs. A burn-in that does not end finds this node silent."""
        if self._process.poll() is None and time.monotonic() < self._until:
            return None
        self._process.kill()
        text, _ = self._process.communicate()
        return parsed(text, _result_of) or asdict(BurnIn(nodes=(), silent=(self._node,)))

    def end(self) -> None:
        """End the burn-in. Its ranks exit when their standard input closes."""
        self._process.kill()
        self._process.communicate()


LARGEST_RESULT = 64 * 1024
"""Characters of a result that goes into every heartbeat."""

_RESULT_FIELDS = frozenset({"nodes", "devices", "alone", "silent", "finished"})


def _result_of(value: Any) -> dict[str, Any] | None:
    whole = isinstance(value, dict) and value.keys() >= _RESULT_FIELDS and len(json.dumps(value)) <= LARGEST_RESULT
    return value if whole else None


def main() -> None:
    """Burn in this node alone, and print the result."""
    from opt_ops.node.nvml import GpuReader

    parser = argparse.ArgumentParser(
        prog="python -m opt_ops.node burn-in", description="Burns in this node, and prints the result as JSON."
    )
    parser.add_argument("--node", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    write = own_stdout()  # NVML may print
    ranks = len(GpuReader().read()["gpus"]) or 2
    multiply = str(max(0.2, min(3.0, options.seconds / 6)))
    commands = on_this_machine([options.node], ranks, "--seconds", multiply)
    write(asdict(burn_in(commands, [options.node], ranks, options.seconds)))


def _run(started: BurnInRanks, nodes: Sequence[str], ranks: int, until: float) -> BurnIn:
    lines = started.receive(len(nodes) * ranks, until, lambda line: line.get("kind") == "device")
    devices = tuple(_tested(line) for line in lines)
    answered = [node for node in nodes if sum(line["node"] == node for line in lines) == ranks]
    silent = [node for node in nodes if node not in answered]
    leaders = {line["node"]: (line["address"], line["port"]) for line in lines if line["local"] == 0}
    fit = [node for node in answered if not any(each.node == node and each.error for each in devices)]
    measured: list[tuple[GroupMeasurement, ...]] = []
    wanted: list[Group] = [(node,) for node in fit] if ranks > 1 else next_round(fit, [])
    while wanted and time.monotonic() < until:
        results, lost = _round(started, wanted, len(measured), ranks, leaders)
        measured.append(results)
        silent, fit = [*silent, *lost], [node for node in fit if node not in lost]
        wanted = next_round(fit, measured[ranks > 1 :], tolerance_of(devices))
    return BurnIn(
        nodes=tuple(fit),
        devices=devices,
        alone=measured[0] if ranks > 1 and measured else (),
        rounds=tuple(measured[ranks > 1 :]),
        silent=tuple(silent),
        finished=not wanted,
    )


def _round(
    started: BurnInRanks, groups: Sequence[Group], number: int, ranks: int, leaders: Mapping[str, tuple[str, int]]
) -> tuple[tuple[GroupMeasurement, ...], list[str]]:
    """Measure the groups. Returns their measurements, and the nodes on which a rank did not answer."""
    places = [{"nodes": group, "address": leaders[group[0]][0], "port": leaders[group[0]][1]} for group in groups]
    started.send({"round": number, "groups": places, "ranks_per_node": ranks, "seconds": GROUP_SECONDS})
    members = [node for group in groups for node in group]
    until = time.monotonic() + GROUP_SECONDS + _SLACK_SECONDS
    lines = started.receive(
        len(members) * ranks, until, lambda line: line.get("kind") == "group" and line.get("round") == number
    )
    lost = [node for node in members if sum(line["node"] == node for line in lines) < ranks]
    return tuple(_measured(group, lines, ranks) for group in groups), lost


def _measured(group: Group, lines: Sequence[Mapping[str, Any]], ranks: int) -> GroupMeasurement:
    """The speed of the slowest rank; None if a rank failed, was silent, or got a wrong sum."""
    own = [line for line in lines if line["node"] in group]
    right = [float(line["gbs"]) for line in own if not line.get("wrong") and line.get("gbs")]
    return GroupMeasurement(nodes=group, gbs=min(right) if len(right) == len(group) * ranks else None)


def _tested(line: Mapping[str, Any]) -> DeviceTest:
    gemm, memory, link = (line.get(part) or {} for part in ("gemm", "memory", "link"))
    return DeviceTest(
        node=str(line["node"]),
        local=int(line["local"]),
        device=str(line["device"]),
        uuid=line.get("uuid"),
        error=line.get("error"),
        gemm_wrong=gemm.get("wrong"),
        memory_wrong=memory.get("wrong"),
        link_wrong=link.get("wrong"),
        tflops=gemm.get("tflops"),
        to_gbs=link.get("to_gbs"),
        from_gbs=link.get("from_gbs"),
    )
