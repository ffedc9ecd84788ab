"""Files that a trainer writes (`config.json`, `telemetry.jsonl`, `phases.jsonl`) or reads (`drill.json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.names import attempt_folder
from opt_ops.core.values import Optimizer, Schedule
from opt_ops.ports import TrainerConfig, TrainerPhase
from opt_ops.runfolder.files import NOT_AS_PROMISED, UNREADABLE, Tail, WarnOnce, read_json, write_json
from opt_ops.runfolder.telemetry import point_of


class FileTrainer:
    """The trainer of a lineage, by its files in each attempt's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._phases: dict[str, Tail] = {}
        self._warnings = WarnOnce()

    def config(self, attempt: str) -> TrainerConfig | None:
        """Return the trainer's settings; None until it has written a valid file."""
        path = self._folder / attempt_folder(attempt) / "config.json"
        try:
            fields = read_json(path)
            return None if fields is None else _config_of(fields)
        except UNREADABLE as error:
            self._warnings.add(path, error)
            return None

    def points(self, attempt: str) -> Sequence[Point]:
        """Return the telemetry since the last call for this attempt. Malformed lines are skipped."""
        path = self._folder / attempt_folder(attempt) / "telemetry.jsonl"
        points: list[Point] = []
        for fields in self._lines(self._tails.setdefault(attempt, Tail(path)), path):
            try:
                points.append(point_of(fields))
            except NOT_AS_PROMISED as error:
                self._warnings.add(path, error)
        return points

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """Return the phase changes since the last call for this attempt. Some trainers write none."""
        path = self._folder / attempt_folder(attempt) / "phases.jsonl"
        phases: list[TrainerPhase] = []
        for fields in self._lines(self._phases.setdefault(attempt, Tail(path)), path):
            try:
                phases.append(
                    TrainerPhase(name=str(fields["phase"]), since=float(fields["ts"]), step=fields.get("step"))
                )
            except NOT_AS_PROMISED as error:
                self._warnings.add(path, error)
        return phases

    def _lines(self, tail: Tail, path: Path) -> list[dict[str, Any]]:
        try:
            return list(tail.read())
        except OSError as error:  # telemetry that stays unreadable ends in a hang signal
            self._warnings.add(path, error)
            return []

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Write the drills of an attempt. The trainer reads them before its next update."""
        write_json(self._folder / attempt_folder(attempt) / "drill.json", list(drills))


def _config_of(fields: Mapping[str, Any]) -> TrainerConfig:
    optimizer = fields["optimizer"]
    return TrainerConfig(
        steps=int(fields["steps"]),
        schedule=Schedule(**{f.name: fields["schedule"][f.name] for f in dataclasses.fields(Schedule)}),
        optimizer=Optimizer(
            betas=tuple(optimizer["betas"]),
            weight_decay=optimizer["weight_decay"],
            clip_norm=optimizer["clip_norm"],
        ),
        versions=fields.get("versions", {}),
        layout=fields.get("layout", {}),
    )
