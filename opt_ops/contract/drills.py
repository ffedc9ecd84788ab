"""Faults that an operator injects. ``drill.json`` in the folder of the attempt says which ones, and when."""

import errno
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opt_ops.contract.errors import UserError
from opt_ops.contract.files import read_regular

_MOST_BYTES = 2**20  # a drill has about 100
_PASSES = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN})


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


IN_STEP = ("forward", "backward", "measure", "update", "copy", "confirm")
"""The places of an update at which a rank can be killed: in the forward or the backward pass, before the reduction that
measures the gradient, in the update of the weights, while the copy is sent, and before it is confirmed."""


@dataclass(frozen=True, slots=True)
class KillDrill:
    """Kill ``rank`` with SIGKILL at the place ``in_step`` of update ``from_step``, or of the first one that follows."""

    name: str
    from_step: int
    rank: int
    in_step: str


@dataclass(frozen=True, slots=True)
class SlowDrill:
    """Each process that takes the place of a lost rank waits ``seconds`` before it joins the others."""

    name: str
    from_step: int
    seconds: float


Drill = LrDrill | FlipDrill | NanDrill | KillDrill | SlowDrill


@dataclass(frozen=True, kw_only=True, slots=True)
class DrillsOfStep:
    """What the drills do in one update.

    Attributes:
        lr_factor: what to multiply the learning rate by.
        nan: whether the loss becomes NaN before the backward pass.
        flip: the rank that flips a bit of its weights after the update.
        kill: the rank that is killed in the update, and the place (``IN_STEP``).
    """

    lr_factor: float = 1.0
    nan: bool = False
    flip: int | None = None
    kill: tuple[int, str] | None = None


class DrillFile:
    """The drills in a file. The file may appear or be replaced at any time.

    Args:
        path: the file.
        newcomer: this process takes the place of a rank that was lost. The drills that are in the file now have begun
            before, and do not begin again here.
    """

    def __init__(self, path: Path, newcomer: bool = False) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._drills: Sequence[Drill] = ()
        self._over = frozenset(drill.name for drill in _present(path)) if newcomer else frozenset[str]()
        self._begins: dict[str, int] = {}
        self._last: tuple[int, DrillsOfStep] | None = None

    def at(self, step: int) -> DrillsOfStep:
        """The drills of update ``step``. Asked again for the same step, it answers the same, and reads nothing.

        Costs one ``stat`` unless the file has changed.

        Raises:
            UserError: the file does not have the form that ``docs/formats.md`` describes.
        """
        if self._last is None or self._last[0] != step:
            self._look(step)
            begun = [drill for drill in self._drills if self._begins[drill.name] <= step]
            factors = [drill.factor for drill in begun if isinstance(drill, LrDrill) and self._lasts(drill, step)]
            first = [drill for drill in begun if self._begins[drill.name] == step]
            flips = [drill.rank for drill in first if isinstance(drill, FlipDrill)]
            kills = [(drill.rank, drill.in_step) for drill in first if isinstance(drill, KillDrill)]
            drills = DrillsOfStep(
                lr_factor=math.prod(factors),
                nan=any(isinstance(drill, NanDrill) for drill in first),
                flip=flips[0] if flips else None,
                kill=kills[0] if kills else None,
            )
            self._last = step, drills
        return self._last[1]

    def _look(self, step: int) -> None:
        """Read the file if it has changed."""
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if seen == self._seen:
                return
            drills = [drill for drill in _read(self._path) if drill.name not in self._over]
        except (FileNotFoundError, NotADirectoryError):
            self._drills, self._seen = (), None
            return
        except OSError:  # a file system that fails must not end training; the next update looks again
            return
        self._drills, self._seen = drills, seen
        for drill in drills:  # who orders a drill cannot know which update comes next: a late one begins now
            self._begins.setdefault(drill.name, max(step, drill.from_step))

    def _lasts(self, drill: LrDrill, step: int) -> bool:
        return step < self._begins[drill.name] + drill.updates


def standby_delay(path: Path) -> float:
    """Seconds for which a process that takes the place of a lost rank waits before it joins, for a drill. Usually 0.

    Args:
        path: ``drill.json`` of the attempt. One that is missing or cannot be read says nothing.
    """
    return max((drill.seconds for drill in _present(path) if isinstance(drill, SlowDrill)), default=0.0)


def _present(path: Path) -> Sequence[Drill]:
    """The drills of a file as it is now; none if it is missing or cannot be read."""
    try:
        return _read(path)
    except (OSError, UserError):
        return ()


def _read(path: Path) -> Sequence[Drill]:
    try:
        drills = _parse_all(json.loads(read_regular(path, _MOST_BYTES)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a list of drills: {type(error).__name__}: {error}") from error
    except OSError as error:
        if error.errno in _PASSES:
            raise
        raise UserError(f"{path} is not a list of drills: {error}") from error
    return drills


def _parse_all(entries: Any) -> Sequence[Drill]:
    if not isinstance(entries, list):
        raise TypeError(f"it holds {type(entries).__name__}")
    drills = [_parse(entry) for entry in entries]  # pyright: ignore[reportUnknownVariableType]
    if len({drill.name for drill in drills}) < len(drills):
        raise ValueError("two drills have the same `id`")
    return drills


_KINDS = ("lr", "nan", "flip-bit", "kill-rank", "slow-standby")


def _parse(entry: dict[str, Any]) -> Drill:
    kind = entry["kind"]
    if kind not in _KINDS:
        raise ValueError(f"kind {kind!r} is unknown; known are {', '.join(_KINDS)}")
    name = entry["id"]
    if not isinstance(name, str):
        raise TypeError(f"`id` is {name!r}, not text")
    match kind:
        case "lr":
            return LrDrill(name, _whole(entry, "from_step"), _whole(entry, "updates"), _positive(entry, "factor"))
        case "nan":
            return NanDrill(name, _whole(entry, "from_step"))
        case "flip-bit":
            return FlipDrill(name, _whole(entry, "from_step"), _whole(entry, "rank"))
        case "kill-rank":
            if (place := entry["in_step"]) not in IN_STEP:
                raise ValueError(f"`in_step` is {place!r}, none of {', '.join(IN_STEP)}")
            return KillDrill(name, _first_step(entry), _whole(entry, "rank"), place)
        case _:
            return SlowDrill(name, _first_step(entry), _positive(entry, "seconds"))


def _first_step(entry: dict[str, Any]) -> int:
    """`from_step`; without one, the next update."""
    return _whole(entry, "from_step") if "from_step" in entry else 0


def _positive(entry: dict[str, Any], field: str) -> float:
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`{field}` is {value!r}, not a number above 0")
    return float(value)


def _whole(entry: dict[str, Any], field: str) -> int:
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53 or value % 1:
        raise ValueError(f"`{field}` is {value!r}, not a whole number")
    return int(value)
