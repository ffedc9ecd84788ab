"""Mirrors a simulated world in a run folder: what its agents and trainers would have written stands in real files.

A supervisor then reads and writes the files that it has in production. Only its clock, its scheduler and its alert
service are simulated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import MANIFEST, MARKER
from opt_ops.core.health import Heartbeat
from opt_ops.core.names import attempt_folder
from opt_ops.laboratory.replay.write_runfolder import config_fields, telemetry_line
from opt_ops.laboratory.simulated import World
from opt_ops.laboratory.simulated.training import Training
from opt_ops.ports import Drilling, Launch, NodeRanksReport, Orders
from opt_ops.runfolder.inbox import FileInbox

_SHARD = "__0_0.distcp"


class WorldFiles:
    """The files of one lineage's agents, trainers and operators."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self._heartbeats_read: dict[str, float] = {}
        self._points: dict[str, int] = {}
        self._phases: dict[str, int] = {}
        self._reports: dict[tuple[str, str], NodeRanksReport] = {}
        self._configured: set[str] = set()
        self._spoiled: list[tuple[str, str]] = []
        self._checkpoints: set[str] = set()
        self._orders = ""

    def write(self) -> None:
        """Write what is new in the world."""
        for request in list(self.world.inbox.values()):
            FileInbox(self.folder).put(request, self.world.wall())
        self.world.inbox.clear()
        for beat in self.world.agents.heartbeats(self._heartbeats_read):
            self.append(self.folder / "health" / f"{beat.node}.jsonl", heartbeat_fields(beat))
        for attempt, training in self.world.trainings.items():
            self._write_attempt(attempt, training)
        while self._spoiled:
            self.write_report(*self._spoiled.pop())
        self._write_checkpoints()

    def append(self, path: Path, *records: dict[str, Any]) -> None:
        """Append lines to a file."""
        append(path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def attempt(self, attempt: str) -> Path:
        """The folder of an attempt."""
        return self.folder / attempt_folder(attempt)

    def _write_attempt(self, attempt: str, training: Training) -> None:
        target = self.attempt(attempt)
        if training.config is not None and attempt not in self._configured:
            self._configured.add(attempt)
            write_durably(_ready(target / "config.json"), json.dumps(config_fields(attempt, training)))
        points = training.points[self._points.get(attempt, 0) :]
        if training.config is not None:
            self._points[attempt] = len(training.points)
            self.append(target / "telemetry.jsonl", *map(telemetry_line, points))
        phases = [each for each in training.phases[self._phases.get(attempt, 0) :] if each.since <= self.world.wall()]
        self._phases[attempt] = self._phases.get(attempt, 0) + len(phases)
        self.append(
            target / "phases.jsonl", *({"ts": each.since, "phase": each.name, "step": each.step} for each in phases)
        )
        for node, report in self.world.agents.reports(attempt).items():
            if self._reports.get((attempt, node)) is not report:
                self._reports[attempt, node] = report
                self.write_report(attempt, node)
        for dump, stacks in training.stacks.items():
            fields = {"stacks": {str(rank): text for rank, text in stacks.items()}, "py_spy": {}}
            write_durably(_ready(target / "stacks" / dump / "all.json"), json.dumps(fields))

    def write_report(self, attempt: str, node: str) -> None:
        """Write the report of a node's agent on its ranks, as its agent would."""
        path = self.attempt(attempt) / "nodes" / f"{node}.json"
        write_durably(_ready(path), json.dumps(self.report_fields(attempt, node)))

    def forget(self, attempt: str, node: str) -> None:
        """Write the report of a node again at the next `write`: somebody has replaced it."""
        self._spoiled.append((attempt, node))

    def forget_config(self, attempt: str) -> None:
        """Write the settings of an attempt again at the next `write`: somebody has replaced them."""
        self._configured.discard(attempt)

    def report_fields(self, attempt: str, node: str) -> dict[str, Any]:
        """What the report of a node holds."""
        part = self.world.agents.parts[attempt][node]
        report = self._reports[attempt, node]
        exits = {each.rank: each for each in report.exits}
        ranks = [
            {"rank": rank, "pid": 4711 + rank, "code": None, "signal": None, "ended": None}
            if (each := exits.get(rank)) is None
            else {"rank": rank, "code": each.code, "signal": each.signal, "ended": each.at, "tail": "simulated: end"}
            for rank in part.ranks
        ]
        return {"v": 1, "node": node, "attempt": attempt, "started": report.started_at, "ranks": ranks}

    def _write_checkpoints(self) -> None:
        there = self.world.checkpoints
        for path in self._checkpoints - there.keys():
            shutil.rmtree(path, ignore_errors=True)
            self._checkpoints.discard(path)
        for path in there.keys() - self._checkpoints:
            self._checkpoints.add(path)
            saved = there[path]
            write_checkpoint(Path(path), saved.checkpoint.step, rotten=bool(saved.damage))

    def follow(self) -> None:
        """Let the simulated agents and trainers read the orders that the supervisor wrote."""
        path = self.folder / "orders.json"
        text = path.read_text() if path.exists() else ""
        if text != self._orders:
            self._orders = text
            self.world.agents.order(_orders_of(json.loads(text)))
        for attempt, training in self.world.trainings.items():
            drills = self.attempt(attempt) / "drill.json"
            if drills.exists() and not training.drills:
                training.drills = json.loads(drills.read_text())
                self.world.timeline.disturb()


def append(path: Path, data: bytes) -> None:
    """Append bytes to a file, and create it and its folder if they are not there."""
    if data:
        with _ready(path).open("ab") as file:
            file.write(data)


def heartbeat_fields(beat: Heartbeat) -> dict[str, Any]:
    """A heartbeat as an agent writes it."""
    fields = dataclasses.asdict(beat)
    del fields["energy_joules"], fields["burn_in"], fields["burned_at"]
    return fields | {"pid": 812, "kernel_log": True}


def manifest_fields(step: int, content: bytes) -> dict[str, Any]:
    """The manifest of a checkpoint of one shard."""
    return {
        "v": 1,
        "step": step,
        "attempt": "1.00-a0",
        "ts": 0.0,
        "layout": {"world": 1, "dp": 1, "tp": 1},
        "data_position": step,
        "tokens": step,
        "settings_digest": "sha256:0",
        "telemetry": {},
        "files": {_SHARD: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }


def write_checkpoint(path: Path, step: int, rotten: bool = False, manifest: str | None = None) -> None:
    """Write a committed checkpoint; `rotten`: its shard differs from the manifest."""
    content = f"weights of step {step} ".encode() * 50
    path.mkdir(parents=True, exist_ok=True)
    (path / _SHARD).write_bytes(content[:-1] + b"!" if rotten else content)
    text = manifest if manifest is not None else json.dumps(manifest_fields(step, content))
    (path / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
    digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    write_durably(path / MARKER, digest + "\n")


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _orders_of(fields: dict[str, Any]) -> Orders:
    launch = fields["launch"]
    return Orders(
        epoch=fields["epoch"],
        seq=fields["seq"],
        launch=None
        if launch is None
        else Launch(**{**launch, "nodes": tuple(launch["nodes"]), "argv": tuple(launch["argv"])}),
        drills=tuple(Drilling(**drill) for drill in fields["drills"]),
        released=tuple(fields["released"]),
        save=fields["save"],
        dump=fields["dump"],
    )
