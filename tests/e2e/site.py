"""A site for end-to-end tests: a folder with a configuration, a real daemon, real agents, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opt_ops import playbook_loader
from opt_ops.core.events import Entry
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.model import State
from opt_ops.runfolder import lineages
from tests.commands import opt_ops

STUB = Path(__file__).with_name("stub_trainer.py")

PATIENCE = 300.0  # seconds, on a busy machine; whoever waits for what comes goes on as soon as it comes

# The shipped playbooks with the patience of a test. On a busy machine, a step takes seconds, a save more, and a
# heartbeat is seconds late: only tests of hangs and of silent nodes have less patience with them.
_STARTUP = {"startup_seconds = 900.0": "startup_seconds = 240.0"}
SILENT_SECONDS = 10.0  # in which no heartbeat of a node is read, before it is silent
QUICK_HANG = {"hang": {"floor_seconds = 30.0": "floor_seconds = 15.0", **_STARTUP}}
QUICK_SILENCE = {"silent_node": {"seconds = 25.0": f"seconds = {SILENT_SECONDS:.1f}"}}
QUICK = {
    "hang.md": _STARTUP,
    "capacity.md": {
        "shrink_seconds = 120.0": "shrink_seconds = 4.0",
        "grow_seconds = 600.0": "grow_seconds = 4.0",
        "last_call_seconds = 180.0": "last_call_seconds = 3.0",
        "leave_seconds = 120.0": "leave_seconds = 60.0",
    },
    "loss_scale_floor.md": {"margin_steps = 100": "margin_steps = 20"},
    "loss_spike.md": {"margin_steps = 100": "margin_steps = 20", "heal_steps = 50": "heal_steps = 20"},
    "non_finite_loss.md": {"margin_steps = 50": "margin_steps = 10"},
}


def until(true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until something is true; what it is."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


class Site:
    """One runs folder with its daemon."""

    def __init__(
        self,
        folder: Path,
        config: str = "",
        trainer: str = f"'{sys.executable}', '{STUB}'",
        quick: bool = True,
        **patience: dict[str, str],
    ) -> None:
        """`quick`: short timeouts instead of the shipped ones; `patience`: others than `QUICK` has, by playbook."""
        self.folder = folder
        self.runs = folder / "runs"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._told: dict[str, tuple[list[tuple[str, int, int]], State]] = {}
        head = "playbooks = 'playbooks'\ntick_seconds = 0.2\n" if quick else ""
        if quick:
            _write_playbooks(folder / "playbooks", {**QUICK, **{f"{name}.md": what for name, what in patience.items()}})
        chronicle = "[chronicle]\nevery_seconds = 3600\n"
        (folder / "opt-ops.toml").write_text(
            f"{head}{config}\n[mlflow]\nenabled = false\n{chronicle}[trainer]\ncommand = [{trainer}]\n"
        )

    @classmethod
    def at(cls, folder: Path) -> Site:
        """The site that was made in this folder, perhaps by another process. Its daemon is not ours."""
        site = cls.__new__(cls)
        site.folder, site.runs, site._daemon, site._told = folder, folder / "runs", None, {}
        return site

    def command(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run an opt-ops command. Returns its stdout."""
        done = opt_ops(self.folder, *arguments, **environment)
        assert done.returncode == code, f"{arguments} left with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stdout + done.stderr

    def start_daemon(self, first: str = "", **environment: str) -> subprocess.Popen[bytes]:
        """Start the daemon; `first`: Python that its process runs before, to change constants of the product."""
        log = (self.folder / "daemon.log").open("ab")
        program = f"import sys; {first}; from opt_ops.cli import main; sys.argv = ['opt-ops', 'daemon', 'run']; main()"
        command = [sys.executable, *(["-c", program] if first else ["-m", "opt_ops", "daemon", "run"])]
        self._daemon = subprocess.Popen(
            command, cwd=self.folder, env={**os.environ, **environment}, stdout=log, stderr=log
        )
        log.close()
        return self._daemon

    def kill_daemon(self) -> None:
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait()

    def start(self, *settings: str, **others: int | str) -> str:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in others.items()]
        return self.command("run", "start", "stub", *(f"--set={s}" for s in settings), *options, "-q").strip()

    def state(self, lineage: str = "1") -> State:
        """The lineage's state. It is asked for ten times a second: the journal is read when it has changed."""
        files = sorted((self.runs / lineage / "journal").glob("*.jsonl"))
        journal = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
        before, state = self._told.get(lineage, (None, State()))
        if before != journal:
            state = lineages.state(self.runs / lineage)
            self._told[lineage] = journal, state
        return state

    def entries(self, lineage: str = "1") -> list[Entry]:
        return lineages.entries(self.runs / lineage)

    def wait(self, what: Callable[[State], Any], seconds: float = PATIENCE, lineage: str = "1") -> Any:
        """Wait until something is true of the lineage's state."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state(lineage)
            if value := what(state):
                return value
            if time.monotonic() > deadline:
                log = (self.folder / "daemon.log").read_text()
                raise AssertionError(f"still {state.status} {state.why}\n{log[-3000:]}")
            time.sleep(0.1)

    def ended(self, lineage: str = "1", seconds: float = PATIENCE) -> State:
        """Wait until the lineage has ended and holds nothing any more."""
        return self.wait(lambda state: state.finished and state, seconds, lineage)

    def looked(self, seconds: float = 0.0) -> None:
        """Wait until the daemon has looked at everything at least once from now on, and has done so for that long."""

        def sign() -> float:
            return (json.loads((self.runs / "daemon.json").read_text()))["ts"]

        began = time.time()
        until(lambda: sign() > began)  # at the end of a round that may have begun before
        first = sign()
        until(lambda: sign() > first and sign() - began >= seconds)

    def ended_ranks(self) -> list[int]:
        """Of the newest attempt, as their agents have reported."""
        reports = [json.loads(path.read_text()) for path in (self.attempt_folder() / "nodes").glob("*.json")]
        return [rank["rank"] for report in reports for rank in report["ranks"] if rank["ended"]]

    def pids(self, attempt: str) -> dict[int, int]:
        """Return the process ids of the ranks, by rank."""
        run, _, number = attempt.partition("-")
        found: dict[int, int] = {}
        for path in (self.runs / "1" / run / number / "nodes").glob("*.json"):
            found |= {rank["rank"]: rank["pid"] for rank in json.loads(path.read_text())["ranks"] if rank["pid"]}
        return found

    def running_ranks(self) -> dict[int, tuple[int, str]]:
        """The newest process of each rank of the newest attempt that runs, and its node, by the agents' reports."""
        found: dict[int, tuple[int, int, str]] = {}
        for path in (self.attempt_folder() / "nodes").glob("*.json"):
            for entry in json.loads(path.read_text())["ranks"]:
                if entry["ended"] is None and entry["pid"]:
                    first = entry.get("generations", [1])[0]
                    found[entry["rank"]] = max(found.get(entry["rank"], (0, 0, "")), (first, entry["pid"], path.stem))
        return {rank: (pid, node) for rank, (_, pid, node) in found.items()}

    def agents(self) -> dict[str, int]:
        """Return the process ids of the local agents, by node."""
        found: dict[str, int] = {}
        for path in (self.runs / "1" / "agents").glob("*.json"):
            found |= {agent["node"]: agent["pid"] for agent in json.loads(path.read_text())}
        return found

    def step(self, lineage: str = "1") -> int:
        """Return the newest step in the newest attempt's telemetry; 0 before the first."""
        attempt = self.state(lineage).attempt
        path = self.attempt_folder(lineage) / "telemetry.jsonl"
        if attempt is None or not path.exists():
            return 0
        lines = path.read_bytes()[-4096:].split(b"\n")
        return json.loads(lines[-2])["num_updates"] if len(lines) > 1 else 0

    def attempt_folder(self, lineage: str = "1") -> Path:
        """Return the folder of the newest attempt."""
        attempt = self.state(lineage).attempt
        return self.runs / lineage / (attempt_folder(attempt.name) if attempt else "")

    def fault(self, what: str, lineage: str = "1") -> None:
        """Inject a fault into the stub trainer of the newest attempt, from its next step on."""
        path = self.attempt_folder(lineage) / "fault"
        path.with_suffix(".new").write_text(what)
        path.with_suffix(".new").replace(path)

    def end_after(self, steps: int) -> None:
        """Let the lineage end about so many steps from now, however long the command takes on a busy machine."""
        slow = self.runs / "1" / "slow"
        slow.touch()
        began = self.step()
        setting = f"steps={until(lambda: (step := self.step()) > began and step) + steps}"
        self.command("run", "set", "1", setting, "--yes", "-q")
        self.wait(lambda state: setting in state.run.settings and state.attempt.run == state.run.name)
        slow.unlink()

    def end_daemon(self) -> None:
        if self._daemon is not None and self._daemon.poll() is None:
            self._daemon.terminate()
            self._daemon.wait(timeout=120)

    def close(self) -> None:
        """End the daemon and every agent; their ranks die with them."""
        self.end_daemon()
        paths = self.runs.glob("[0-9]*/agents/*.json")  # of all allocations: they may hold the same nodes
        for pid in [agent["pid"] for path in paths for agent in json.loads(path.read_text())]:
            with suppress(OSError):  # it has ended; its number may be another process by now
                if str(self.runs).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def _write_playbooks(folder: Path, changes: Mapping[str, Mapping[str, str]]) -> None:
    folder.mkdir()
    for path in playbook_loader.folder().glob("*.md"):
        text = path.read_text()
        for old, new in changes.get(path.name, {}).items():
            assert old in text, f"{path.name} has no `{old}`"
            text = text.replace(old, new, 1)
        (folder / path.name).write_text(text)
