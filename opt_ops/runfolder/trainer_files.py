"""What a trainer writes for an attempt (`config.json`, `telemetry.jsonl`, `phases.jsonl`) and reads (`drill.json`)."""

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
    """`config.json`, `telemetry.jsonl` and `drill.json` of each attempt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._phases: dict[str, Tail] = {}
        self._warnings = WarnOnce()

    def config(self, attempt: str) -> TrainerConfig | None:
        """None until the trainer has written one that says what it must."""
        path = self._folder / attempt_folder(attempt) / "config.json"
        try:
            fields = read_json(path)
            return None if fields is None else _config_of(fields)
        except UNREADABLE as error:
            self._warnings.add(path, error)
            return None

    def points(self, attempt: str) -> Sequence[Point]:
        """Telemetry that came since the last call for this attempt. Malformed lines are left out."""
        path = self._folder / attempt_folder(attempt) / "telemetry.jsonl"
        points: list[Point] = []
        for fields in self._lines(self._tails.setdefault(attempt, Tail(path)), path):
            try:
                points.append(point_of(fields))
            except NOT_AS_PROMISED as error:
                self._warnings.add(path, error)
        return points

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """Changes of phase that came since the last call for this attempt. Another trainer may write none."""
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
        except OSError as error:  # telemetry that stays unread is missed as a hang is
            self._warnings.add(path, error)
            return []

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Write the attempt's drills; the trainer reads them before its next update."""
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
