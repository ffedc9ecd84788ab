"""Attempts of the checked trainer: its ranks, started as a node agent starts them, in a folder of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

from opt_ops.contract import environment
from opt_ops.contract.files import write_durably
from opt_ops.node.process_groups import WELL_SECONDS, RankProcess, catches, die_with_parent, kill, left_over
from opt_ops.trainer_check.file_order import FileOrder
from opt_ops.trainer_check.records import (
    Ran,
    Telemetry,
    checkpoints,
    ended,
    last_words,
    read_config,
    read_lines,
    unfinished,
)

POLL_SECONDS = 0.01
GRACE_SECONDS = 5.0  # between SIGINT and SIGKILL, as the node agent waits
NODE = "trainer-check"
_LINES_LATE = 2  # a save may begin before the line of its update is written
ENDLESS = 100_000
"""Steps of an attempt that the check ends, and an interval of saves that is never reached."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """The command that is checked.

    Attributes:
        command: Its words.
        recipe: Value of `--recipe`.
        settings: `KEY=VALUE`, for every attempt.
        scratch: The folder of all attempts.
        temporary: Folder for temporary files of the trainer.
    """

    command: tuple[str, ...]
    recipe: str
    settings: tuple[str, ...]
    scratch: Path
    temporary: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How an attempt is started.

    Attributes:
        name: Its name, and that of its folder. It has no hyphen.
        world: Number of ranks.
        start: `--from-scratch`, `--resume PATH` or nothing.
        extra: More options.
        checkpoint_dir: A folder that exists already. None: a new one.
        drills: Content of drill.json.
        run_dir: False: the option is left out.
    """

    name: str
    world: int
    steps: int
    every: int
    start: tuple[str, ...] = ("--from-scratch",)
    extra: tuple[str, ...] = ()
    checkpoint_dir: Path | None = None
    drills: tuple[dict[str, object], ...] = ()
    run_dir: bool = True

    @property
    def attempt(self) -> str:
        """The attempt, as the supervisor would name it."""
        return f"{self.name}-a1"


@dataclass(slots=True)
class Pace:
    """How fast the trainer is, measured in the attempts so far. All waits follow from it, with generous floors."""

    start_seconds: float | None = None
    step_seconds: float = 0.0
    save_seconds: float = 0.0

    def learn(self, ran: Ran) -> None:
        """Take the speed of an attempt that trained."""
        if ran.first_line_seconds is None:
            return
        self.start_seconds = max(self.start_seconds or 0.0, ran.first_line_seconds)
        times = [value for step in ran.telemetry.steps if (value := ran.telemetry.one(step, "ts")) is not None]
        gaps = sorted(abs(after - before) for before, after in pairwise(times))
        if gaps:
            self.step_seconds = max(self.step_seconds, min(gaps[len(gaps) // 2], 600.0))
            self.save_seconds = max(self.save_seconds, min(gaps[-1], 600.0))

    @property
    def start(self) -> float:
        """Seconds that a start, a refusal or an end may take."""
        return 300.0 if self.start_seconds is None else max(30.0, 8 * self.start_seconds)

    def updates(self, count: int) -> float:
        """Seconds that updates may take."""
        return max(15.0, 10 * count * self.step_seconds + 10 * self.save_seconds)


@dataclass(slots=True)
class Attempt:
    """An attempt that runs."""

    launch: Launch
    run_dir: Path
    checkpoint_dir: Path
    fences: tuple[Path, ...]
    ranks: list[RankProcess] = field(default_factory=list[RankProcess])
    trouble: str = ""
    order: FileOrder | None = None
    began: float = 0.0
    first_line: float | None = None
    late_lines: str = ""
    watched: list[int] = field(default_factory=list[int])

    @property
    def codes(self) -> tuple[int | None, ...]:
        """By rank: how it ended; None while it runs."""
        return tuple(rank.code for rank in self.ranks)

    @property
    def all_run(self) -> bool:
        """Whether no rank has ended."""
        return all(code is None for code in self.codes)

    @property
    def over(self) -> bool:
        """Whether every rank has ended."""
        return all(code is not None for code in self.codes)

    @property
    def count(self) -> int:
        """The number of lines of telemetry."""
        try:
            found = (self.run_dir / "telemetry.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0
        if found and self.first_line is None:
            self.first_line = time.monotonic() - self.began
        return found

    @property
    def telemetry(self) -> Telemetry:
        """The telemetry so far."""
        return Telemetry(read_lines(self.run_dir / "telemetry.jsonl"))

    def look_at_lines(self, saved: int) -> None:
        """While all ranks are stopped, after step `saved` was committed: is all of telemetry there?"""
        try:
            whole = (self.run_dir / "telemetry.jsonl").read_bytes().endswith(b"\n")
        except OSError:
            return
        if not whole:
            self.late_lines = "a line of telemetry was there in part: write each line at once, after its update"
        elif saved > (last := self.last_step) + _LINES_LATE:
            self.late_lines = f"step {saved} was committed while the last line of telemetry was of update {last}"

    @property
    def last_step(self) -> int:
        """The last step of telemetry, 0 if there is none."""
        return max(self.telemetry.steps, default=0)

    @property
    def committed(self) -> dict[int, Path]:
        """The committed checkpoints by step."""
        return dict(checkpoints(self.checkpoint_dir))

    @property
    def unfinished(self) -> list[str]:
        """What lies in the checkpoint folder without a marker."""
        return unfinished(self.checkpoint_dir)

    async def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition. Returns False after `seconds`, or when every rank has ended without it."""
        deadline = time.monotonic() + seconds
        while True:
            over = self.over
            if condition():
                return True
            if over or time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)

    async def more_updates(self, number: int, seconds: float) -> bool:
        """Wait for more lines of telemetry while every rank runs."""
        wanted = self.count + number
        await self.until(lambda: self.count >= wanted or not self.all_run, seconds)
        return self.count >= wanted and self.all_run

    def catches(self, rank: int, number: signal.Signals) -> bool:
        """Whether a rank has a handler for a signal. The node agent sends SIGUSR1 and SIGUSR2 only then."""
        return catches(self.ranks[rank].pid, number)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to the processes of ranks, not to their children."""
        for rank in ranks:
            if self.ranks[rank].alive:
                os.kill(self.ranks[rank].pid, number)

    def send_group(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to ranks and to their children. Without ranks: to all."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].signal_group(number)

    def supersede(self, rank: int = 0) -> None:
        """Let the fence of a rank name another attempt."""
        write_durably(self.fences[rank], json.dumps({"v": 1, "attempt": f"{self.launch.name}-a2"}))

    def how(self) -> str:
        """How the ranks stand or have ended, with the last line that one of them printed."""
        logs = (self.run_dir / "logs" / f"rank-{rank:04d}.log" for rank in range(len(self.ranks)))
        said = next((words for log in logs if (words := last_words(log))), "")
        return f"{ended(self.codes)}{f'; it said: {said}' if said else ''}"


class Attempts:
    """Starts and ends attempts. `end_all` ends every process that was started."""

    def __init__(self, trainer: Trainer, pace: Pace) -> None:
        self.trainer = trainer
        self.pace = pace
        self._live: list[Attempt] = []

    def start(self, launch: Launch) -> Attempt:
        """Start the ranks of an attempt.

        Raises:
            OSError: the command cannot be started.
        """
        folder = self.trainer.scratch / launch.name
        run_dir, checkpoint_dir = folder / "a1", launch.checkpoint_dir or folder / "checkpoints"
        for made in (run_dir / "logs", run_dir / "stacks", checkpoint_dir):
            made.mkdir(parents=True, exist_ok=True)
        names = ["attempt.json", *(f"attempt-of-rank-{rank}.json" for rank in range(1, launch.world))]
        fences = tuple(folder / name for name in names)
        for fence in fences:
            write_durably(fence, json.dumps({"v": 1, "attempt": launch.attempt}))
        if launch.drills:
            write_durably(run_dir / "drill.json", json.dumps(launch.drills))
        attempt = Attempt(launch, run_dir, checkpoint_dir, fences)
        attempt.order, attempt.began = FileOrder(run_dir), time.monotonic()
        self._live.append(attempt)
        port = _free_port()
        for rank in range(launch.world):
            attempt.ranks.append(self._spawn(attempt, rank, port))
        return attempt

    def _spawn(self, attempt: Attempt, rank: int, port: int) -> RankProcess:
        launch = attempt.launch
        place = environment.Place(rank, launch.world, rank)
        variables = {
            **os.environ,
            **environment.of_rank(
                place, local_world=launch.world, address="127.0.0.1", port=port, node=NODE, folder=attempt.run_dir
            ),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing is written beside the trainer's sources
            "TMPDIR": str(self.trainer.temporary),
        }
        with (attempt.run_dir / "logs" / f"rank-{rank:04d}.log").open("ab") as log:
            process = subprocess.Popen(
                self._argv(attempt, rank),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  (it only calls prctl)
            )
        return RankProcess(process)

    def _argv(self, attempt: Attempt, rank: int) -> list[str]:
        launch, trainer = attempt.launch, self.trainer
        argv = [*trainer.command, "--recipe", trainer.recipe]
        for setting in (*trainer.settings, f"steps={launch.steps}", f"checkpoint_every={launch.every}"):
            argv += ["--set", setting]
        argv += launch.extra
        if launch.run_dir:
            argv += ["--run-dir", str(attempt.run_dir)]
        argv += ["--checkpoint-dir", str(attempt.checkpoint_dir), *launch.start]
        return [*argv, "--attempt", launch.attempt, "--fence", str(attempt.fences[rank])]

    async def run(self, launch: Launch, *, refused: bool = False) -> Ran:
        """Run an attempt to its end. `refused`: end it at its first update; it should not train."""
        attempt = self.start(launch)
        start = self.pace.start
        if not await attempt.until(lambda: attempt.count > 0 or attempt.over, start):
            attempt.trouble = f"it made no update and did not end in {start:.0f} s"
        while not attempt.trouble and not attempt.over and not (refused and attempt.count):
            known, seconds = attempt.count, max(self.pace.updates(4), self.pace.start)
            if not await attempt.until(lambda known=known: attempt.over or attempt.count > known, seconds):
                attempt.trouble = f"after step {attempt.last_step} no update came and it did not end in {seconds:.0f} s"
        return await self.finish(attempt)

    async def finish(self, attempt: Attempt) -> Ran:
        """End an attempt that still runs, and what it left behind; tell what it did."""
        if not attempt.over:
            attempt.trouble = attempt.trouble or "the check ended it"
            attempt.send_group(signal.SIGCONT)
            attempt.send_group(signal.SIGINT)
            await attempt.until(lambda: attempt.over, GRACE_SECONDS)
        elif not any(attempt.codes):  # as with the node agent: who ended well may still be writing
            await _nothing_left(attempt, WELL_SECONDS)
        attempt.send_group(signal.SIGKILL)
        await attempt.until(lambda: attempt.over, GRACE_SECONDS)
        codes, how = attempt.codes, attempt.how()
        self._release(attempt)
        first = attempt.order.appeared_before_written("config.json", "telemetry.jsonl") if attempt.order else None
        if attempt.order:
            attempt.order.close()
        config, problem = read_config(attempt.run_dir / "config.json")
        return Ran(
            name=attempt.launch.name,
            world=attempt.launch.world,
            run_dir=attempt.run_dir,
            checkpoint_dir=attempt.checkpoint_dir,
            codes=codes,
            trouble=attempt.trouble,
            telemetry=attempt.telemetry,
            phases=read_lines(attempt.run_dir / "phases.jsonl"),
            config=config,
            config_problem=problem,
            config_first=first,
            said=how.partition("; it said: ")[2],
            first_line_seconds=attempt.first_line,
            saved=checkpoints(attempt.checkpoint_dir),
        )

    def _release(self, attempt: Attempt) -> None:
        kill(_left_of(attempt))
        for rank in attempt.ranks:
            rank.release()
        if attempt in self._live:
            self._live.remove(attempt)

    def end_all(self) -> None:
        """Kill every process that still runs, with its children."""
        for attempt in list(self._live):
            attempt.send_group(signal.SIGKILL)
            deadline = time.monotonic() + GRACE_SECONDS
            while not attempt.over and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            self._release(attempt)


async def _nothing_left(attempt: Attempt, seconds: float) -> None:
    """Wait until nothing runs that the ranks of an attempt have started."""
    deadline = time.monotonic() + seconds
    while _left_of(attempt):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(10 * POLL_SECONDS)


def _left_of(attempt: Attempt) -> list[int]:
    marked = {environment.NODE: NODE, environment.ATTEMPT: str(attempt.run_dir)}
    return left_over({rank.pid for rank in attempt.ranks}, marked)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
