"""The table of ends: how a lineage ends, by how its ranks end and by what is left of telemetry and checkpoint.

`golden/ends.txt` beside this file has a line for each of the 192 cells, for a person to read. `REWRITE_GOLDEN=1`
writes it again.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from opt_ops.core.values import Severity
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Ending, Planned
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync

GOLDEN = Path(__file__).with_name("golden") / "ends.txt"
STEPS, BAD, UNSEEN = 120, 95, 107
"""The last step; where the loss diverges; from where on telemetry is lost: less than a hang takes to be noticed."""

LAST = {"last": STEPS, "before": STEPS - 1}
ENDS = {"code 0": {}, "code 1": {"code": 1}, "signal": {"signal": 9}, "node": {"node_down": True}}
CHECKPOINTS = {
    "there": {},
    "torn": {"damage": "__0_0.distcp: the content differs from the manifest"},
    "missing": {"committed": False},
}
COLUMNS = ("step", "ranks", "telemetry", "daemon", "loss", "checkpoint")
CELLS = list(product(LAST, ENDS, ("seen", "lost"), ("there", "away"), ("sound", "diverged"), CHECKPOINTS))


def lived(folder: Path, cell: tuple[str, ...]) -> SimulatedLineage:
    last, ranks, telemetry, daemon, loss, checkpoint = cell
    ending = Ending(step=LAST[last], **ENDS[ranks], **CHECKPOINTS[checkpoint])
    plan = [Planned(fault=start(), at=0.0), Planned(fault=faults.EndThus(ending=ending), at=0.0)]
    if loss == "diverged":
        plan.append(Planned(fault=faults.Diverge(divergence=Divergence(step=BAD)), at=0.0))
    if telemetry == "lost":
        plan.append(Planned(fault=faults.LoseTelemetry(from_step=UNSEEN), step=BAD - 5))
    lineage = SimulatedLineage(folder, plan, physics(STEPS, step_seconds=2.0, loss_start=2.2), Costs(commit=4.0))
    if daemon == "away":
        lineage.drive(until=250.0)
        assert lineage.state.attempt is not None
        assert (lineage.state.attempt.last_step or 0) < BAD
        lineage.end()
        lineage.world.advance(lineage.world.now + 300.0)
    lineage.drive(until=20_000.0)
    return lineage


def told(lineage: SimulatedLineage) -> str:
    """The end in one line: status, attempts, incidents with what was done, alerts by severity, remark."""
    state = lineage.state
    assert state.finished, f"stuck: {state.status} {state.why}"
    incidents = [f"{i.kind}:{i.decision.action if i.decision else '?'}" for i in state.incidents.values()]
    severities = Counter(alert.severity for _, alert in lineage.world.alerts if alert.severity is not Severity.INFO)
    alerts = ", ".join(f"{number} {severity}" for severity, number in sorted(severities.items())) or "-"
    attempts = f"{len(state.attempts)} attempts" if len(state.attempts) > 1 else "1 attempt"
    remark = "remark" if state.why else "-"
    return f"{state.status} {attempts:10} | {', '.join(incidents) or '-':60} | {alerts:18} | {remark}"


def test_the_table_of_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    head = " ".join(f"{name:9}" for name in COLUMNS)
    lines = [f"{head} | status and attempts   | {'incidents, with what was done':60} | alerts             | remark"]
    for number, cell in enumerate(CELLS):
        what = " ".join(f"{word:9}" for word in cell)
        lines.append(f"{what} | {told(lived(tmp_path / str(number), cell))}")
    text = "\n".join(lines) + "\n"
    if os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_a_stopped_lineage_is_settled_once_its_last_checkpoint_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    stop = faults.Ask(request="r-stop", verb="stop", arguments={"reason": "enough"})
    plan = (Planned(fault=start(), at=0.0), Planned(fault=stop, step=42))
    lineage = SimulatedLineage(tmp_path, plan, physics(STEPS), Costs(commit=4.0, examine=400.0))
    assert lineage.drive(until=20_000.0).finished
    supervisor = lineage.supervisor
    assert supervisor is not None
    assert not supervisor.settled
    lineage.world.advance(lineage.world.now + 400.0)
    supervisor.tick()
    assert supervisor.settled
    newest = list(lineage.state.checkpoints.values())[-1]
    assert newest.verified
