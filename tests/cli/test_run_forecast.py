"""`opt-ops run forecast`: from a curve, from smaller runs, and what it refuses."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.commands import opt_ops
from tests.core.story import Story
from tests.e2e.stub_trainer import telemetry

STEPS = 3000


def lr(step: int) -> float:
    return 1e-3 * min(step / 50, 1.0 - 0.9 * (step - 50) / (STEPS - 50))


def lineage(folder: Path, name: str, height: float, last: int) -> None:
    """A lineage whose loss falls by a power law, and a little with the learning rate."""
    draw = random.Random(int(name))
    Story().training(last, ()).save(folder / "runs" / name)
    path = folder / "runs" / name / "12.00" / "a0" / "telemetry.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, last + 1):
        loss = height + 6.0 * (step + 10) ** -0.4 + 100.0 * lr(step) + draw.gauss(0.0, 0.02)
        lines.append(json.dumps(telemetry(step, lr(step), loss, 0.5)) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    lineage(folder, "10", 2.5, STEPS)
    lineage(folder, "11", 2.3, STEPS)
    lineage(folder, "12", 2.0, STEPS // 2)
    lineage(folder, "13", 2.0, 60)
    return folder


def asked(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return opt_ops(site, "run", "forecast", *words)


def items(site: Path, *words: str) -> list[dict[str, Any]]:
    done = asked(site, *words, "-o", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == "opt-ops/run-forecast/1"
    return answer["items"]


def test_what_was_foretold_comes(site: Path):
    (row,) = items(site, "10", "--until", "1500", "--at", "3000")
    assert row["low"] < row["loss"] < row["high"]
    assert abs(row["expected"] - row["loss"]) < 0.1
    assert (row["fitted_to"], row["points"], row["basis"]) == (1500, 1500, "own curve")


def test_smaller_runs_say_what_a_forecast_misses(site: Path):
    (own,) = items(site, "12", "--at", "3000")
    (corrected,) = items(site, "12", "--at", "3000", "--from", "10", "--from", "11")
    true = 2.0 + 6.0 * 3010**-0.4 + 100.0 * lr(3000)
    assert own["low"] < true < own["high"]
    assert abs(corrected["expected"] - true) < 0.05
    assert (corrected["basis"], corrected["loss"]) == ("smaller runs", None)


def test_too_few_points_and_steps_that_are_past_are_refused(site: Path):
    done = asked(site, "13")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has too few points for a forecast: 60 points up to step 60" in done.stderr
    done = asked(site, "10", "--until", "1500", "--at", "1400")
    assert done.returncode == 2
    assert "--at must be after step 1500" in done.stderr
