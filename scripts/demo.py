"""The demo: one supervised lineage on this machine, four injected faults, no operator.

Three local nodes: two train, one is a spare. While a tiny model trains, the demo kills a rank, lets a node report Xid
79, kills the daemon, and multiplies the learning rate of the trainer. A rank and a node are replaced in place by a warm
process of the spare: the other rank keeps its process, and no step is lost. Where no warm process is ready in time, or
the trainer cannot do that, all ranks are restarted. The daemon reads back the wrong rate at the first such update, and
rolls back to before it. The demo uses the commands that an operator would type. It exits with 0 only
if the lineage is COMPLETED and every recovery is proven.

TRAINER=hf takes Hugging Face's Trainer, SCHEDULE=cosine another schedule; TRAINER=lightning Lightning's,
TRAINER=pytorch a loop in plain PyTorch.
DRILLS=kill-rank,lr takes some of the drills.

It must pass on a busy machine, too. So it reads the run folder itself, where a command would take seconds; each fault
waits for the proof of the recovery before it; and the learning rate is changed at a step that the trainer gets in
advance.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from opt_ops.cli.shared.views import EventRows
from opt_ops.core.detect.point import Point
from opt_ops.core.events import kind_of
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state import in_place
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.runfolder import lineages
from opt_ops.runfolder.trainer_files import FileTrainer

STEPS = 400
LR_STEP = 200  # by then there are checkpoints to go back to
STANDBY_STEP = 180  # up to here, faults of ranks and nodes wait until a standby is ready
DEADLINE_SECONDS = 1500.0  # of a busy machine; an idle one needs about 150
BUSY = 75  # exit code while the daemon's own sync still runs
OPT_OPS = [sys.executable, "-m", "opt_ops"]
ROOT = Path(__file__).resolve().parent.parent

TRAINERS: dict[str, tuple[str, str | None, str | None, list[str]]] = {
    "": ("opt-tiny", None, None, []),
    "hf": ("hf-tiny", "examples/hf_trainer.py", "lr_scheduler_type", ["pause=0.03"]),
    "lightning": ("lightning-tiny", "examples/lightning_trainer.py", None, ["pause=0.1"]),
    "pytorch": ("loop", "examples/pytorch_loop.py", None, ["pause=0.1"]),
}
"""By the value of TRAINER: recipe; script, if it is not our trainer; its setting for SCHEDULE; more settings.

A pause stands for the work of a larger model: on a fast machine, 400 updates would be over before the last drill.
"""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@dataclass
class Drill:
    """A fault, the step and the number of proven recoveries for which its command waits, and the command."""

    step: int
    after: int
    name: str
    command: list[str]
    in_place: bool = False  # it waits for a standby, too

    def on(self, node: str) -> Drill:
        """This drill on a node on which a rank runs."""
        command = [word.format(node=node) for word in self.command]
        return replace(self, name=self.name.format(node=node), command=command)


EXPECTED = {
    "kill-rank": FailureClass.PROCESS_DEATH,
    "xid": FailureClass.BAD_GPU,
    "lr": FailureClass.UNPLANNED_LR,
    "kill-daemon": FailureClass.DAEMON_RESTART,
}
"""The drills in their order, and the incident that each must cause."""


def chosen_drills() -> list[str]:
    """Return the names of the drills in $DRILLS; without it, of all."""
    return [name for name in EXPECTED if name in (os.environ.get("DRILLS") or ",".join(EXPECTED)).split(",")]


def drills(lineage: str) -> list[Drill]:
    """Return the drills in their order."""
    lr = ["lr", lineage, "--factor", "50", "--updates", "30", "--from-step", str(LR_STEP)]
    orders = {
        "kill-rank": (40, "kill a rank with SIGKILL", ["kill-rank", lineage, "--rank", "1"]),
        "xid": (80, "Xid 79 on {node}: its GPU falls off the bus", ["xid", lineage, "--node", "{node}", "--xid", "79"]),
        "lr": (80, f"multiply the learning rate by 50 for 30 updates, from step {LR_STEP}", lr),
        "kill-daemon": (120, "kill the daemon with SIGKILL", ["kill-daemon", lineage]),
    }
    # The daemon is killed while the learning rate is still to be changed: the one that follows it must see that.
    proven = {name: number for number, name in enumerate(chosen_drills())}
    proven["kill-daemon"] = proven.get("lr", proven.get("kill-daemon", 0))
    replaced = ("kill-rank", "xid")
    return [Drill(orders[name][0], proven[name], *orders[name][1:], name in replaced) for name in chosen_drills()]


def prepare(runs: Path) -> tuple[str, list[str]]:
    """Write the configuration for $TRAINER. Returns its recipe and its own settings."""
    name, schedule = os.environ.get("TRAINER", ""), os.environ.get("SCHEDULE", "")
    if name not in TRAINERS:
        sys.exit(f"TRAINER={name} is not one of {', '.join(filter(None, TRAINERS))}")
    recipe, script, setting, settings = TRAINERS[name]
    if schedule and setting is None:
        sys.exit("SCHEDULE needs TRAINER=hf: the script of the other trainers says which schedule they have")
    if script:
        config = runs.absolute() / f"demo-{name}.toml"
        command = json.dumps([sys.executable, str(ROOT / script)])
        # Two trainers share two cores with the daemon: one thread each is enough for a tiny model.
        config.write_text(
            f"runs = {json.dumps(str(runs.absolute()))}\n[trainer]\ncommand = {command}\n"
            'environment = {OMP_NUM_THREADS = "1"}\n'
        )
        os.environ["OPT_OPS_CONFIG"] = str(config)
    return recipe, [*settings, *([f"{setting}={schedule}"] if schedule else [])]


def opt_ops(*arguments: str) -> str:
    """Run an opt-ops command. Returns its output. A command that fails ends the demo with its message."""
    deadline = time.monotonic() + 60.0
    while True:
        done = subprocess.run([*OPT_OPS, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != BUSY or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    if done.returncode != 0:
        sys.exit(f"opt-ops {' '.join(arguments)} ended with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout


class DaemonService:
    """Does what systemd does for a daemon: starts it, and starts it again if it was killed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = self._start()
        self.restarts = 0

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([*OPT_OPS, "daemon", "run"], stdout=log, stderr=log)

    def step(self) -> bool:
        """Start the daemon again if it was killed. Returns whether that was necessary."""
        code = self._process.poll()
        if code is None:
            return False
        if code != -signal.SIGKILL:
            sys.exit(f"the daemon ended with exit code {code}; its log is {self._log}")
        self._process = self._start()
        self.restarts += 1
        return True

    def end(self) -> None:
        """Stop the daemon."""
        self._process.terminate()
        self._process.wait()


class Watcher:
    """Follows the journal and the telemetry: prints new journal entries, and a line of progress."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trainer = FileTrainer(folder)
        self._rows = EventRows()
        self._newest: Point | None = None
        self._began = time.monotonic()
        self.state = State()
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

    def ready(self, drill: Drill) -> bool:
        """Whether training runs at the drill's step, and the recoveries that it waits for are proven."""
        incidents = self.state.incidents.values()
        proven = {incident.drill for incident in incidents if incident.drill and incident.proven}
        calm = self.state.status is Status.TRAINING and all(each.closed_at is not None for each in incidents)
        if not calm or len(proven) < drill.after or self._newest is None or self._newest.step < drill.step:
            return False
        return not drill.in_place or self._newest.step >= STANDBY_STEP or in_place.standbys(self.state) != 0

    def look(self) -> None:
        """Read what is new, and print it."""
        before = self.state.attempt
        for row in self._rows.of(lineages.entries(self._folder), lambda entry: kind_of(entry.event) in TOLD):
            self.print_line(row["text"])
        self.state = self._rows.state or self.state
        if (attempt := self.state.attempt) is None:
            return
        if before is None or before.name != attempt.name:
            self._newest = None
        points = self._trainer.points(attempt.name)
        self._newest = points[-1] if points else self._newest
        loss = self._newest.loss if self._newest else None
        self.progress.update(
            self._bar,
            completed=self._newest.step if self._newest else 0,
            run=attempt.run,
            state=str(self.state.status),
            loss=f"{loss:.3f}" if loss else "-",
            clock=f"{time.monotonic() - self._began:.0f} s",
        )

    def print_line(self, text: str, style: str = "") -> None:
        """Print a line above the progress."""
        console.print(Text(f"{time.monotonic() - self._began:5.0f} s  {text}", style=style), soft_wrap=True)


TOLD = frozenset(
    {
        *("attempt_intended", "incident_opened", "recovery_decided", "members_intended", "members_joined"),
        *("members_failed", "standby_seen", "node_excluded", "run_planned", "incident_closed", "lineage_completed"),
        "lineage_halted",
    }
)
"""The kinds of events that the demo prints."""


def run_drills(folder: Path, service: DaemonService) -> None:
    """Inject each drill at its step, once every recovery before is proven. Then wait for the end of the lineage."""
    lineage = folder.name
    waiting, watcher = drills(lineage), Watcher(folder)
    deadline = time.monotonic() + DEADLINE_SECONDS
    with Live(watcher.progress, console=console, refresh_per_second=4, transient=True):
        while time.monotonic() < deadline:
            if service.step():
                watcher.print_line("restarted  the daemon, which was killed")
            watcher.look()
            if watcher.state.ended:
                return
            if waiting and watcher.ready(waiting[0]):
                attempt = watcher.state.attempt
                drill = waiting.pop(0).on(attempt.nodes[-1] if attempt else "n2")
                watcher.print_line(f"DRILL      {drill.name}", style="bold")
                opt_ops("drill", *drill.command, "--yes", "-q")
            time.sleep(0.1)
    sys.exit(f"lineage {lineage} did not end within {DEADLINE_SECONDS:.0f} s; see opt-ops run explain {lineage}")


def print_incidents(report: dict[str, Any]) -> None:
    """Print the table of incidents with the cost of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("INCIDENT", "KIND", "ACTION", "LEARNING RATE", "DISCARDED", "DOWN", "PROVEN", "CAUSE"):
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


def print_replaced(runs: Path, lineage: str) -> None:
    """Print who took the place of lost ranks, and who stayed."""
    state = lineages.state(runs / lineage)
    for incident in state.incidents.values():
        if text := in_place.in_sentences(state, incident):
            console.print(f"\n{incident.name}  {text}")


def wait_until_finished(runs: Path, lineage: str) -> None:
    """Wait until the daemon has seen that its agents have ended."""
    deadline = time.monotonic() + 60.0
    while not lineages.state(runs / lineage).finished and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> int:
    """Run the demo; its exit code."""
    began = time.monotonic()
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    recipe, others = prepare(runs)
    service = DaemonService(runs / "daemon.log")
    try:
        while (
            not (runs / "daemon.json").exists()
            or json.loads((runs / "daemon.json").read_text())["ts"] < time.time() - 5
        ):
            service.step()
            time.sleep(0.2)
        pairs = [f"steps={STEPS}", f"optim.total_steps={STEPS}", "checkpoint_every=25", *others]
        settings = [f"--set={pair}" for pair in pairs]
        lineage = opt_ops("run", "start", recipe, *settings, "--nodes", "2", "--spares", "1", "-q").strip()
        console.print(f"lineage {lineage}: {recipe}, {STEPS} steps, nodes n1 and n2, spare node n3")
        run_drills(runs / lineage, service)
        wait_until_finished(runs, lineage)
    finally:
        service.end()
    opt_ops("logbook", "render", lineage, "-q")
    opt_ops("mlflow", "sync", lineage, "-q")
    chronicle = runs / lineage / "chronicle"
    report = json.loads((chronicle / "report.json").read_text())
    print_incidents(report)
    print_replaced(runs, lineage)
    goodput, seconds = report["goodput"]["goodput"] or 0.0, time.monotonic() - began
    console.print(f"\n{report['status']} at step {report['step']}, goodput {goodput:.0%}, {seconds:.0f} s in total")
    console.print(f"logbook   {chronicle / 'logbook.html'}   (text: {chronicle / 'logbook.md'})")
    console.print("mlflow    make mlflow   (or: opt-ops mlflow open)")
    console.print(f"explain   opt-ops run explain {lineage}")
    expected = {EXPECTED[name] for name in chosen_drills()}
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
