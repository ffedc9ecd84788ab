"""Runs one lineage under the real supervisor, with the real trainer or a broken one, and reads what came of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cures_draws import BASE
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.model import Incident, State
from tests.e2e.site import Site

TRAINER = Path(__file__).with_name("cures_trainer.py")
_SECONDS = 1500.0  # for one lineage; alone on two cores it needs about 60


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A lineage that has ended.

    Attributes:
        status: Of the lineage, such as COMPLETED.
        losses: Of the settled history, by step: loss and tokens.
        lines: Number of updates in all attempts, discarded ones included.
        incidents: All of them.
    """

    status: str
    losses: dict[int, tuple[float, int]]
    lines: int
    incidents: list[dict[str, Any]]


@contextmanager
def site(folder: Path, inject: dict[str, Any]) -> Iterator[Site]:
    """A folder with a daemon whose trainer obeys `inject`."""
    shutil.rmtree(folder, ignore_errors=True)  # of a case that was broken off
    folder.mkdir(parents=True)
    orders = folder / "inject.json"
    orders.write_text(json.dumps(inject))
    environment = f"{{OMP_NUM_THREADS = '1', OPT_OPS_CACHE = '{folder.parent / 'cache'}'}}"
    made = Site(
        folder,
        config="tick_seconds = 0.2\n",
        trainer=f"'{sys.executable}', '{TRAINER}', '--inject', '{orders}'",
        quick=False,
    )
    with (folder / "opt-ops.toml").open("a") as file:
        file.write(f"environment = {environment}\ncheck = false\n")  # still in the table of the trainer
    try:
        yield made
    finally:
        made.close()


def run(
    folder: Path,
    settings: Sequence[str],
    data: Path,
    inject: dict[str, Any],
    nodes: int = 1,
    more: Sequence[str] = (),
) -> Ran:
    """Train one lineage to its end. With what is injected it may also halt."""
    with site(folder, inject) as made:
        made.start_daemon()
        options = [f"--set={each}" for each in (*BASE, *settings)]
        spares = nodes - 1
        shape = [f"--nodes={nodes}", f"--spares={spares}"]
        made.command("run", "start", "opt-tiny", *options, f"--data={data}", *shape, *more, "-q")
        state = made.wait(lambda s: (s.finished or s.ended) and s, _SECONDS)
        made.command("logbook", "render", "1", "-q")
        return _read(made, state)


def run_alone(folder: Path, settings: Sequence[str], data: Path, inject: dict[str, Any]) -> Ran:
    """Train without a supervisor."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    orders = folder / "inject.json"
    orders.write_text(json.dumps(inject))
    options = [f"--set={each}" for each in (*BASE, *settings)]
    places = ["--run-dir", folder / "run", "--checkpoint-dir", folder / "checkpoints", "--data", data]
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, TRAINER, "--inject", orders, "--recipe", "opt-tiny", *options, *places],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPT_OPS_CACHE": str(folder.parent / "cache")},
            stdout=log,
            stderr=log,
            timeout=_SECONDS,
            check=True,
        )
    losses = dict(_losses(folder / "run" / "telemetry.jsonl"))
    return Ran(status="COMPLETED", losses=losses, lines=len(losses), incidents=[])


def _losses(path: Path) -> Iterator[tuple[int, tuple[float, int]]]:
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        yield line["num_updates"], (line["loss"], line["tokens"])


def _read(made: Site, state: State) -> Ran:
    report = json.loads((made.runs / "1/chronicle/report.json").read_text())
    told = {item["incident"]: item for item in report["incidents"]}
    losses: dict[int, tuple[float, int]] = {}
    lines = 0
    for attempt in state.attempts.values():
        start = attempt.checkpoint.step if attempt.checkpoint else 0
        losses = {step: value for step, value in losses.items() if step <= start}
        new = list(_losses(made.runs / "1" / attempt_folder(attempt.name) / "telemetry.jsonl"))
        lines += len(new)
        losses |= {step: (loss, tokens) for step, (loss, tokens) in new if loss is not None}
    incidents = [_incident(incident, told.get(incident.name, {})) for incident in state.incidents.values()]
    return Ran(status=str(state.status), losses=losses, lines=lines, incidents=incidents)


def _incident(incident: Incident, told: dict[str, Any]) -> dict[str, Any]:
    decision = incident.decision
    return {
        "kind": incident.kind,
        "acted": incident.acted_on,
        "action": str(decision.action) if decision else None,
        "remedy": told.get("remedy"),
        "lr_factor": decision.lr_factor if decision else None,
        "skip_batches": decision.skip_batches if decision else 0,
        "settings": list(decision.settings) if decision else [],
        "causes": [str(each.cause) for each in incident.causes],
        "onset": incident.onset_step,
        "failed": incident.step_failed,
        "to": decision.checkpoint.step if decision and decision.checkpoint else None,
        "why": incident.cause,
    }
