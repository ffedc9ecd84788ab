"""The demo: one supervised run on this machine, four faults put in on purpose, nobody at the keyboard.

Three local nodes, two of them training and one spare. While opt-tiny trains, a rank is killed, a node's GPU reports
Xid 79, the daemon is killed, and the learning rate is really multiplied until the loss really diverges. Everything
is done with the commands that a person would type. It leaves with 0 only if the run is COMPLETED and every incident
was recovered and proven.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from opt_ops.runfolder import lineages

STEPS = 400
DEADLINE_SECONDS = 600.0
BUSY = 75  # the daemon's own sync is still at it
OPT_OPS = [sys.executable, "-m", "opt_ops"]

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@dataclass
class Drill:
    """A fault, the step from which it may be put in, and the command that does it."""

    step: int
    name: str
    command: list[str]


def drills(lineage: str) -> list[Drill]:
    """In the order in which they are put in."""
    return [
        Drill(60, "kill a rank with SIGKILL", ["kill-rank", lineage, "--rank", "1"]),
        Drill(100, "Xid 79 on n2: its GPU falls off the bus", ["xid", lineage, "--node", "n2", "--xid", "79"]),
        Drill(130, "kill the daemon with SIGKILL", ["kill-daemon", lineage]),
        Drill(
            200, "multiply the learning rate by 50 for 30 updates", ["lr", lineage, "--factor", "50", "--updates", "30"]
        ),
    ]


def opt_ops(*arguments: str) -> str:
    """Run a command of opt-ops; its output. A command that fails ends the demo with its message."""
    deadline = time.monotonic() + 60.0
    while True:
        done = subprocess.run([*OPT_OPS, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != BUSY or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    if done.returncode != 0:
        sys.exit(f"opt-ops {' '.join(arguments)} left with {done.returncode}:\n{done.stderr}")
    return done.stdout


class Keeper:
    """What systemd does for a daemon: start it, and start it again when it was killed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = self._start()
        self.restarts = 0

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([*OPT_OPS, "daemon", "run"], stdout=log, stderr=log)

    def step(self) -> bool:
        """Returns whether it had to be started again."""
        code = self._process.poll()
        if code is None:
            return False
        if code != -signal.SIGKILL:
            sys.exit(f"the daemon left with {code}; its log is {self._log}")
        self._process = self._start()
        self.restarts += 1
        return True

    def end(self) -> None:
        """Ask it to leave."""
        self._process.terminate()
        self._process.wait()


class Watcher:
    """Prints what the journal tells, and a line of progress."""

    def __init__(self, lineage: str) -> None:
        self._lineage = lineage
        self._seq = 0
        self._began = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.fields[run]}"),
            TextColumn("{task.fields[state]}", style="bold"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[clock]}"),
            console=console,
        )
        self._bar = self.progress.add_task("", total=STEPS, run="", state="", loss="-", clock="")

    def row(self) -> dict[str, Any]:
        """The lineage's line of `opt-ops q`."""
        rows = [json.loads(line) for line in opt_ops("q", "-o", "jsonl").splitlines()]
        row = next(row for row in rows if row["lineage"] == self._lineage)
        self.progress.update(
            self._bar,
            completed=row["step"] or 0,
            run=row["run"] or "-",
            state=row["state"],
            loss=f"{row['loss']:.3f}" if row["loss"] else "-",
            clock=f"{time.monotonic() - self._began:.0f} s",
        )
        return row

    def news(self) -> None:
        """Print what was journaled since the last call."""
        for line in opt_ops("events", self._lineage, "-o", "jsonl").splitlines():
            event = json.loads(line)
            if event["seq"] > self._seq:
                self._seq = event["seq"]
                if (told := TELL.get(event["kind"])) is not None:
                    self.say(told(event["fields"]))

    def say(self, text: str, style: str = "") -> None:
        """A line above the progress."""
        console.print(Text(f"{time.monotonic() - self._began:5.0f} s  {text}", style=style), soft_wrap=True)


TELL: dict[str, Callable[[dict[str, Any]], str]] = {
    "attempt_intended": lambda f: f"launch     {f['attempt']} on {', '.join(f['nodes'])} from {_from(f['checkpoint'])}",
    "incident_opened": lambda f: f"incident   {f['incident']} {f['failure']}: {f['cause']}",
    "recovery_decided": lambda f: f"decision   {f['incident']} {f['action']} ({f['playbook']}, rung {f['rung'] + 1})",
    "node_excluded": lambda f: f"exclude    {f['node']} ({f['reason']})",
    "run_planned": lambda f: f"next run   {f['run']}" if f["parent"] else f"first run  {f['run']}",
    "incident_closed": lambda f: f"proven     {f['incident']}" if f["proven"] else f"NOT PROVEN {f['incident']}",
    "lineage_completed": lambda f: f"completed  at step {f['step']}",
    "lineage_halted": lambda f: f"HALTED     {f['why']}",
}


def _from(checkpoint: dict[str, Any] | None) -> str:
    return f"step {checkpoint['step']}" if checkpoint else "scratch"


def supervise(lineage: str, keeper: Keeper) -> None:
    """Put in each drill when its step has come and the one before is recovered; wait for the end."""
    waiting, watcher = drills(lineage), Watcher(lineage)
    deadline = time.monotonic() + DEADLINE_SECONDS
    with Live(watcher.progress, console=console, refresh_per_second=4, transient=True):
        while time.monotonic() < deadline:
            if keeper.step():
                watcher.say("the daemon was killed; started again")
            row = watcher.row()
            watcher.news()
            if row["state"] in ("COMPLETED", "HALTED", "CANCELLED"):
                return
            quiet = row["state"] == "TRAINING" and not row["reason"]
            if waiting and quiet and (row["step"] or 0) >= waiting[0].step:
                drill = waiting.pop(0)
                watcher.say(f"DRILL      {drill.name}", style="bold")
                opt_ops("drill", *drill.command, "--yes", "-q")
            time.sleep(0.5)
    sys.exit(f"lineage {lineage} did not end within {DEADLINE_SECONDS:.0f} s")


def tell(report: dict[str, Any]) -> None:
    """The table of incidents, and what each cost."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("INCIDENT", "KIND", "ACTION", "LEARNING RATE", "STEPS LOST", "DOWN", "PROVEN", "CAUSE"):
        table.add_column(heading)
    for item in report["incidents"]:
        before, after = item["lr_before"], item["lr_after"]
        lowered = before is not None and after is not None and not math.isclose(before, after, rel_tol=1e-6)
        table.add_row(
            item["incident"],
            item["kind"],
            item["action"],
            f"{before:.3g} → {after:.3g}" if lowered else "-",
            str(item["steps_lost"]),
            f"{item['seconds_down'] or 0:.1f} s",
            "yes" if item["proven"] else "NO",
            Text(item["cause"]),
        )
    console.print()
    console.print(table)


def settle(runs: Path, lineage: str) -> None:
    """Let the daemon see that its agents have left."""
    deadline = time.monotonic() + 10.0
    while not lineages.state(runs / lineage).finished and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> int:
    """Run the demo; its exit code."""
    began = time.monotonic()
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    keeper = Keeper(runs / "daemon.log")
    try:
        while (
            not (runs / "daemon.json").exists()
            or json.loads((runs / "daemon.json").read_text())["ts"] < time.time() - 5
        ):
            keeper.step()
            time.sleep(0.2)
        settings = [f"--set=steps={STEPS}", f"--set=optim.total_steps={STEPS}", "--set=checkpoint_every=25"]
        lineage = opt_ops("run", "start", "opt-tiny", *settings, "--nodes", "2", "--spares", "1", "-q").strip()
        console.print(f"lineage {lineage}: opt-tiny, {STEPS} steps, nodes n1 n2 and the spare n3")
        supervise(lineage, keeper)
        settle(runs, lineage)
    finally:
        keeper.end()
    opt_ops("logbook", "render", lineage, "-q")
    opt_ops("mlflow", "sync", lineage, "-q")
    chronicle = runs / lineage / "chronicle"
    report = json.loads((chronicle / "report.json").read_text())
    tell(report)
    goodput = report["goodput"]["goodput"]
    console.print(
        f"\n{report['status']} at step {report['step']}, goodput {goodput:.0%}, {time.monotonic() - began:.0f} s in all"
    )
    console.print(f"logbook   {chronicle / 'logbook.html'}   (text: {chronicle / 'logbook.md'})")
    console.print("mlflow    make mlflow   (or: opt-ops mlflow open)")
    console.print(f"why       opt-ops run explain {lineage}")
    expected = {"process_death", "bad_gpu", "daemon_restart", "loss_spike"}
    recovered = {item["kind"] for item in report["incidents"] if item["proven"] and item["drill"]}
    if report["status"] == "COMPLETED" and recovered >= expected and all(i["proven"] for i in report["incidents"]):
        return 0
    console.print(
        f"NOT RECOVERED: {', '.join(sorted(expected - recovered)) or 'an incident is not proven'}", style="bold"
    )
    return 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
