"""Writes a replay as a run folder, with the files of the simulated trainer, for the logbook and the ledger."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.names import attempt_folder
from opt_ops.laboratory.simulated import World
from opt_ops.laboratory.simulated.training import Training
from opt_ops.runfolder.files import write_json, write_text


def write_telemetry(folder: Path, world: World) -> None:
    """Write `config.json`, `telemetry.jsonl` and `phases.jsonl` of every attempt below the lineage's folder.

    Raises:
        OSError: a file cannot be written.
    """
    for attempt, training in world.trainings.items():
        target = folder / attempt_folder(attempt)
        target.mkdir(parents=True, exist_ok=True)
        if training.config is not None:
            write_json(target / "config.json", config_fields(attempt, training))
        write_text(target / "telemetry.jsonl", "".join(json.dumps(telemetry_line(p)) + "\n" for p in training.points))
        phases = ({"ts": p.since, "phase": p.name, "step": p.step} for p in training.phases)
        write_text(target / "phases.jsonl", "".join(json.dumps(phase) + "\n" for phase in phases))


def config_fields(attempt: str, training: Training) -> dict[str, Any]:
    """What `config.json` of an attempt holds."""
    config = training.config
    assert config is not None
    return {"v": 1, "attempt": attempt, "recipe": "simulated", **asdict(config)}


def telemetry_line(point: Point) -> dict[str, Any]:
    """A line of `telemetry.jsonl` as the trainer writes it."""
    return {
        "ts": round(point.ts, 3),
        "num_updates": point.step,
        "loss": None if point.loss is None else round(point.loss, 5),
        "gnorm": None if point.gnorm is None else round(point.gnorm, 5),
        "lr": point.lr,
        "betas": list(point.betas),
        "weight_decay": point.weight_decay,
        "clip_norm": point.clip_norm,
        "finite": point.finite,
        "skipped": 0,
        "step_seconds": round(point.step_seconds, 3),
        "save_seconds": point.save_seconds,
        "tokens": point.tokens,
        "wps": round(point.wps, 1),
    }
