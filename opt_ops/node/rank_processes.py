"""The ranks of one attempt on one node: started at most once, signalled, reaped, and reported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from opt_ops.contract import environment
from opt_ops.core.names import attempt_folder
from opt_ops.node.log import log
from opt_ops.node.process_groups import CleanUp, RankProcess, catches, die_with_parent, end_earlier
from opt_ops.node.rank_log import LOOK_SECONDS, RankLog
from opt_ops.runfolder.files import create_json, read_json, write_json

GRACE_SECONDS = 5.0  # between SIGINT and SIGKILL
DUMP_SECONDS = 3.0  # for ranks to write their stacks
PY_SPY_SECONDS = 5.0  # for py-spy to read the stacks of ranks that did not answer

PIPE, TRACE = "nccl-", "nccl/rank-"  # names for NCCL's flight recorder, each followed by the rank


class RankProcesses:
    """The processes of one attempt on this node, and the report on them."""

    def __init__(self, folder: Path, node: str, launch: dict[str, Any]) -> None:
        self.attempt: str = launch["attempt"]
        self._path = folder / attempt_folder(self.attempt) / "nodes" / f"{node}.json"
        self._logs = folder / attempt_folder(self.attempt) / "logs"
        self._stacks = folder / attempt_folder(self.attempt) / "stacks"
        self._node = node
        self._launch = launch
        self._lineage, self._folder = folder.absolute(), (folder / attempt_folder(self.attempt)).absolute()
        self._processes: dict[int, RankProcess] = {}
        self._clean_up = CleanUp(node, self._folder)
        self._followed: dict[int, RankLog] = {}
        self._report: dict[str, Any] = {"v": 1, "node": node, "attempt": self.attempt, "started": time.time()}
        self._killed_at: float | None = None
        self._saved = True
        self.reporting = True
        """False while the lineage's folder is gone: a report would create it again."""

    def start(self) -> None:
        """Start the ranks, unless they were started before: an attempt starts at most once on a node."""
        per_node = self._launch["ranks_per_node"]
        first = self._launch["nodes"].index(self._node) * per_node
        ranks = [{"rank": first + i, "pid": None, "code": None, "signal": None, "ended": None} for i in range(per_node)]
        self._report["ranks"] = ranks
        if not create_json(self._path, self._report):
            self._report_as_killed()
            return
        end_earlier(self._node, self._lineage, self._folder)
        for made in (self._logs, (self._stacks / TRACE).parent):
            made.mkdir(parents=True, exist_ok=True)
        for local, entry in enumerate(ranks):
            try:
                self._processes[local] = self._spawn(entry["rank"], local)
                entry["pid"] = self._processes[local].pid
                self._followed[local] = RankLog(self._log(entry["rank"]))
            except OSError as error:
                with suppress(OSError):  # if the disk is full, the exit code must do
                    self._log(entry["rank"]).write_text(f"cannot start {self._launch['argv'][0]}: {error}\n")
                entry["code"], entry["ended"] = 127, time.time()
        self._save()

    def _report_as_killed(self) -> None:
        """An earlier agent of this node started the ranks, and they died with it."""
        self._report = read_json(self._path) or self._report
        for entry in self._report["ranks"]:
            if entry["ended"] is None:
                entry["signal"], entry["ended"] = int(signal.SIGKILL), time.time()
        self._save()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank:04d}.log"

    def _save(self) -> None:
        if not self.reporting:
            return
        try:
            write_json(self._path, self._report)
            self._saved = True
        except OSError as error:  # a full disk must not end the ranks; the report is written when there is room
            self._saved = False
            log(f"{self._path} cannot be written: {error}")

    def _spawn(self, rank: int, local: int) -> RankProcess:
        launch = self._launch
        per_node = launch["ranks_per_node"]
        place = environment.Place(rank, len(launch["nodes"]) * per_node, local)
        variables = {
            **_flight_recorder(self._stacks),  # settings of the site override these
            **os.environ,
            **launch["environment"],
            **environment.of_rank(
                place,
                local_world=per_node,
                address=launch["address"],
                port=launch["port"],
                node=self._node,
                attempt=self.attempt,
            ),
            environment.ATTEMPT: str(self._folder),
            "PYTHONUNBUFFERED": "1",
        }
        with self._log(rank).open("ab") as file:
            process = subprocess.Popen(
                launch["argv"],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  (the agent has no threads)
            )
        return RankProcess(process)

    def reap(self) -> bool:
        """Record the ranks that ended since the last call. Returns whether there is any."""
        changed = not self._saved
        self._look_at_logs()
        for local, process in self._processes.items():
            entry = self._report["ranks"][local]
            if entry["ended"] is None and (code := process.code) is not None:
                entry["code"], entry["signal"] = (code, None) if code >= 0 else (None, -code)
                entry["ended"] = time.time()
                if code != 0:
                    self._add_last_words(local, entry)
                changed = True
        if changed:
            self._save()
        if self._all_ended or self._processes:
            ranks = {self._report["ranks"][local]["rank"]: process for local, process in self._processes.items()}
            self._clean_up.look(ranks, ending=self._killed_at is not None)
        return changed

    def _look_at_logs(self) -> None:
        """Follow the logs of the ranks that run; all of them together for `LOOK_SECONDS`."""
        running = [each for local, each in self._followed.items() if self._report["ranks"][local]["ended"] is None]
        for followed in running:
            share = LOOK_SECONDS / len(running)
            followed.look(time.monotonic() + share)

    def _add_last_words(self, local: int, entry: dict[str, Any]) -> None:
        followed = self._followed[local]
        entry["tail"] = followed.tail()
        entry["causes"] = [
            {"line": line.text, "at": line.at, "step": line.step, "stale": line.stale} for line in followed.end()
        ]

    def drill(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank and its children."""
        for local in self._processes:
            if self._report["ranks"][local]["rank"] == rank:
                self._processes[local].signal_group(number)

    def save(self) -> None:
        """Ask the ranks for a checkpoint (SIGUSR1). A rank without a handler is skipped: the signal would kill it."""
        for process in self._processes.values():
            if process.alive and catches(process.pid, signal.SIGUSR1):
                os.kill(process.pid, signal.SIGUSR1)

    def dump(self, dump: str) -> None:
        """Ask the ranks for their stacks (SIGUSR2), and collect them. py-spy, if installed, reads those of the others.

        If the ranks use NCCL's flight recorder, it writes its own files beside.
        """
        folder = self._stacks
        alive = {self._report["ranks"][i]["rank"]: p for i, p in self._processes.items() if p.alive}
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
        write_json(folder / dump / f"{self._node}.json", {"v": 1, "stacks": stacks, "py_spy": others})

    def end(self) -> None:
        """End the ranks: SIGINT at the first call, SIGKILL to the rest after the grace period.

        SIGTERM means notice by the scheduler, which sends it to every process of a job that it will end. The ranks must
        save then, not end.
        """
        if self._killed_at is None:
            self._killed_at = time.monotonic()
            number = signal.SIGINT
        elif time.monotonic() - self._killed_at > GRACE_SECONDS:
            number = signal.SIGKILL
        else:
            return
        for process in self._processes.values():
            process.signal_group(number)

    @property
    def done(self) -> bool:
        """Whether all ranks have ended, and nothing of what they started is left."""
        return self._all_ended and self._clean_up.done

    @property
    def _all_ended(self) -> bool:
        return all(entry["ended"] is not None for entry in self._report["ranks"])


def _flight_recorder(folder: Path) -> dict[str, str]:
    """Settings of torch's NCCL flight recorder: its request pipe (torch's DumpPipe) and its trace file.

    torch appends the rank to each name. `torchfrtrace` reads the trace files.
    """
    trace = f"{folder / TRACE}"
    return {
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{folder / PIPE}",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": trace,
        "TORCH_FR_DUMP_TEMP_FILE": trace,
    }


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
