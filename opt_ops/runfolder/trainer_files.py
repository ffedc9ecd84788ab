"""Files that a trainer writes (`config.json`, `telemetry.jsonl`, `phases.jsonl`) or reads (`drill.json`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.contract.phases import PhaseName
from opt_ops.core.detect.point import Point
from opt_ops.core.names import attempt_folder
from opt_ops.core.values import Deduplicated, Optimizer, PlannedChange
from opt_ops.errors import OptOpsError
from opt_ops.ports import Rejoined, TrainerConfig, TrainerPhase
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import Tail, identity_of, read_json, write_json
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.schedule_fields import schedule_of
from opt_ops.runfolder.step_order import StepOrder
from opt_ops.runfolder.telemetry import LARGEST_TELEMETRY, point_of

OTHER_PHASE = "other"
"""A phase that docs/formats.md does not name."""
_PHASES = frozenset(PhaseName)
_MOST_PLANNED = 1000
_MOST_SOURCES = 100
_MOST_TESTS = 1000  # files of test texts
_REASONS = ("exact", "near", "contaminated", "corrupt")  # why text was removed before
_LARGEST_CONFIG = 4 * 1024 * 1024
_LARGEST_PHASES = 64 * 1024 * 1024


class FileTrainer:
    """The trainer of a lineage, by its files in each attempt's folder. No content of these files raises."""

    def __init__(self, folder: Path, left_out: LeftOutCounter | None = None) -> None:
        self._folder = folder
        self._left_out = left_out or LeftOutCounter(folder)
        self._tails: dict[str, Tail] = {}
        self._orders: dict[str, StepOrder] = {}
        self._phases: dict[str, Tail] = {}
        self._members: dict[str, Tail] = {}
        self._seen_config: tuple[str, tuple[int, ...]] | None = None
        self._config: TrainerConfig | None = None

    def config(self, attempt: str) -> TrainerConfig | None:
        """Return the trainer's settings; None until it has written a valid file."""
        path = self._folder / attempt_folder(attempt) / "config.json"
        try:
            if (identity := identity_of(path)) is None:
                return None
            if (attempt, identity) != self._seen_config:
                self._config = self._read_config(path)
                self._seen_config = attempt, identity
        except OSError as error:
            self._left_out.unreadable("config", path, error)
            return None
        return self._config

    def _read_config(self, path: Path) -> TrainerConfig | None:
        left_out: list[str] = []
        try:
            found = _config_of(f.Record(read_json(path, _LARGEST_CONFIG), left_out=left_out))
        except (f.BadField, OptOpsError) as error:
            self._left_out.add("config", path, f"{error}: these settings are not taken")
            return None
        if left_out:
            self._left_out.add("config", path, left_out[0])
        self._left_out.took("config", path)
        return found

    def points(self, attempt: str) -> Sequence[Point]:
        """Return the telemetry since the last call for this attempt, without lines that are not as promised."""
        path = self._folder / attempt_folder(attempt) / "telemetry.jsonl"
        tail = self._tails.get(attempt)
        if tail is None:
            tail = self._tails[attempt] = self._tail("telemetry", path, LARGEST_TELEMETRY)
            self._orders[attempt] = StepOrder(lambda why: self._left_out.add("telemetry", path, why))
        points: list[Point] = []
        taken = 0
        for fields in self._lines("telemetry", tail, path):
            left_out: list[str] = []
            try:
                point = point_of(fields, left_out)
            except f.BadField as error:
                self._left_out.add("telemetry", path, str(error), tail.line)
                continue
            if left_out:
                self._left_out.add("telemetry", path, left_out[0], tail.line)
            taken += 1
            points += self._orders[attempt].take(point)
        self._left_out.took("telemetry", path, taken)
        return points

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """Return the phase changes since the last call for this attempt. Some trainers write none."""
        path = self._folder / attempt_folder(attempt) / "phases.jsonl"
        tail = self._phases.get(attempt)
        if tail is None:
            tail = self._phases[attempt] = self._tail("phases", path, _LARGEST_PHASES)
        phases: list[TrainerPhase] = []
        for fields in self._lines("phases", tail, path):
            left_out: list[str] = []
            try:
                phases.append(_phase_of(f.Record(fields, left_out=left_out)))
            except f.BadField as error:
                left_out = [str(error)]
            else:
                self._left_out.took("phases", path)
            if left_out:
                self._left_out.add("phases", path, left_out[0], tail.line)
        return phases

    def members(self, attempt: str) -> Sequence[Rejoined]:
        """Return the generations that came together since the last call, without lines that are not as promised."""
        path = self._folder / attempt_folder(attempt) / "members.jsonl"
        tail = self._members.get(attempt)
        if tail is None:
            tail = self._members[attempt] = self._tail("members", path, _LARGEST_PHASES)
        found: list[Rejoined] = []
        for fields in self._lines("members", tail, path):
            try:
                found.append(_rejoined_of(f.Record(fields)))
            except f.BadField as error:
                self._left_out.add("members", path, str(error), tail.line)
            else:
                self._left_out.took("members", path)
        return found

    def _tail(self, source: str, path: Path, most: int) -> Tail:
        return Tail(path, most, lambda line, why: self._left_out.add(source, path, why, line))

    def _lines(self, source: str, tail: Tail, path: Path) -> Iterator[dict[str, Any]]:
        try:
            yield from tail.read()
        except OSError as error:  # telemetry that stays unreadable ends in a hang signal
            self._left_out.unreadable(source, path, error)

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Write the drills of an attempt. The trainer reads them before its next update."""
        write_json(self._folder / attempt_folder(attempt) / "drill.json", list(drills))


def _phase_of(record: f.Record) -> TrainerPhase:
    name = record.required("phase", f.name)
    return TrainerPhase(
        name=name if name in _PHASES else OTHER_PHASE,
        since=record.required("ts", f.moment),
        step=record.optional("step", f.step, None),
    )


def _rejoined_of(record: f.Record) -> Rejoined:
    return Rejoined(
        generation=record.required("generation", f.whole(2)),
        step=record.required("step", f.step),
        at=record.required("ts", f.moment),
        repeated=record.optional("repeated", f.whole(0), 0),
    )


def _batch_of(settings: f.Record | None) -> int | None:
    """The sequences of a batch by the recipe; None if the trainer's settings do not say it."""
    sizes = settings.part("data") if settings is not None else None
    return sizes.optional("global_batch", f.whole(1), None) if sizes is not None else None


def _config_of(record: f.Record) -> TrainerConfig:
    """The settings. Those that decisions are compared with must be right; other fields can be left out."""
    steps = f.whole(1, f.MOST_STEPS)
    schedule = schedule_of(f.Record(record.required("schedule", f.members), "schedule.", record.left_out))
    optimizer = f.Record(record.required("optimizer", f.members), "optimizer.")
    return TrainerConfig(
        steps=record.required("steps", steps),
        batch=_batch_of(record.part("settings")),
        schedule=schedule,
        optimizer=Optimizer(
            betas=optimizer.nullable("betas", f.items(f.number(), 16), ()),
            weight_decay=optimizer.nullable("weight_decay", f.number(), 0.0),
            clip_norm=optimizer.nullable("clip_norm", f.number(), 0.0),
        ),
        versions=record.optional("versions", f.plain_object, {}),
        layout=record.optional("layout", f.plain_object, {}),
        planned=record.each("planned", _planned_change, _MOST_PLANNED),
        capabilities=record.optional("capabilities", f.items(f.name, 100), ()),
        data=data.optional("digest", f.name, None) if (data := record.part("data")) is not None else None,
        dedup=data.each("dedup", _deduplicated, _MOST_SOURCES) if data is not None else (),
    )


def _deduplicated(record: f.Record) -> Deduplicated:
    removed = f.Record(record.required("removed", f.members), "removed.")
    return Deduplicated(
        source=record.required("source", f.text(f.LONGEST_NAME)),
        digest=record.required("digest", f.name),
        threshold=record.required("threshold", f.number(0, 1)),
        documents_in=record.required("documents_in", f.whole(0)),
        documents_out=record.required("documents_out", f.whole(0)),
        removed={name: removed.required(name, f.whole(0)) for name in _REASONS},
        against=_against(record),
    )


def _against(record: f.Record) -> Mapping[str, int]:
    """Documents removed by file of test texts, also where there were none. Of a path, the last two names are kept."""
    listed = record.each("against", lambda each: each.required("path", f.name), _MOST_TESTS)
    counted = record.part("contaminated")
    found = dict.fromkeys(("/".join(Path(path).parts[-2:]) for path in listed), 0)
    for path, number in counted.all(f.whole(0), _MOST_TESTS) if counted else ():
        short = "/".join(Path(path).parts[-2:])
        found[short] = found.get(short, 0) + number
    return found


def _planned_change(record: f.Record) -> PlannedChange:
    return PlannedChange(
        step=record.required("step", f.whole(1, f.MOST_STEPS)),
        what=record.optional("what", f.text(f.LONGEST_NAME), ""),
    )
