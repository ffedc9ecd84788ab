"""Faults that an operator injects. ``drill.json`` in the folder of the attempt says which ones, and when."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops.contract.errors import UserError


@dataclass(frozen=True, slots=True)
class LrDrill:
    """Multiply the learning rate by ``factor`` in ``updates`` updates; the first of them is ``from_step``."""

    name: str
    from_step: int
    updates: int
    factor: float


@dataclass(frozen=True, slots=True)
class FlipDrill:
    """Flip a bit in the weights of ``rank`` after update ``from_step``, or after the first update that follows."""

    name: str
    from_step: int
    rank: int


@dataclass(frozen=True, slots=True)
class NanDrill:
    """Make the loss of update ``from_step``, or of the first update that follows, NaN before the backward pass."""

    name: str
    from_step: int


Drill = LrDrill | FlipDrill | NanDrill


class DrillFile:
    """The drills in a file. The file may appear or be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._drills: list[Drill] = []
        self._begins: dict[str, int] = {}

    def lr_factor(self, step: int) -> float:
        """What to multiply the learning rate of update ``step`` by. Costs one ``stat`` unless the file has changed.

        Raises:
            UserError: the file does not have the form that ``docs/formats.md`` describes.
        """
        lr = (drill for drill in self._current(step) if isinstance(drill, LrDrill))
        return math.prod(drill.factor for drill in lr if self._is_active(drill, step))

    def flip(self, step: int) -> int | None:
        """The rank that flips a bit after update ``step``. Call :meth:`lr_factor` first: it reads the file."""
        flips = (drill for drill in self._drills if isinstance(drill, FlipDrill))
        return next((drill.rank for drill in flips if self._begins[drill.name] == step), None)

    def nan(self, step: int) -> bool:
        """Whether the loss of update ``step`` becomes NaN. Call :meth:`lr_factor` first: it reads the file."""
        return any(isinstance(drill, NanDrill) and self._begins[drill.name] == step for drill in self._drills)

    def _current(self, step: int) -> list[Drill]:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._drills, self._seen = [], None
            return []
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen != self._seen:
            self._drills = _read(self._path)
            self._seen = seen
            for drill in self._drills:  # who orders a drill cannot know which update comes next: a late one begins now
                self._begins.setdefault(drill.name, max(step, drill.from_step))
        return self._drills

    def _is_active(self, drill: LrDrill, step: int) -> bool:
        begin = self._begins[drill.name]
        return begin <= step < begin + drill.updates


def _read(path: Path) -> list[Drill]:
    try:
        return [_parse(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of drills: {type(error).__name__}: {error}") from error


def _parse(entry: dict[str, Any]) -> Drill:
    if entry["kind"] == "flip-bit":
        return FlipDrill(str(entry["id"]), int(entry["from_step"]), int(entry["rank"]))
    if entry["kind"] == "nan":
        return NanDrill(str(entry["id"]), int(entry["from_step"]))
    if entry["kind"] != "lr":
        raise ValueError(f"kind {entry['kind']!r} is unknown; 'lr', 'nan' and 'flip-bit' are known")
    return LrDrill(str(entry["id"]), int(entry["from_step"]), int(entry["updates"]), float(entry["factor"]))
