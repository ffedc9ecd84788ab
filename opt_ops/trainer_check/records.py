"""What an attempt left behind, read leniently: a fault of one file must not spoil the judgement of another promise."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from opt_ops.contract.manifest import MANIFEST, MARKER, CheckpointError, committed, verify

FILE_CLOCK_SECONDS = time.clock_getres(5)
"""The tick of the clock that gives files their times: CLOCK_REALTIME_COARSE of clock_gettime(2)."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A file of JSON lines.

    Attributes:
        found: Whether there is such a file.
        values: The objects in it.
        problems: What is wrong with other lines.
    """

    found: bool
    values: tuple[dict[str, Any], ...] = ()
    problems: tuple[str, ...] = ()


def read_lines(path: Path) -> Lines:
    """Read a file of JSON lines. A last line without its newline is a problem, too: the trainer has ended."""
    try:
        content = path.read_bytes()
    except OSError:
        return Lines(False)
    values: list[dict[str, Any]] = []
    problems: list[str] = []
    *whole, rest = content.split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number} of {path.name} is not JSON: {error}")
            value = _with_constants(line)
        if isinstance(value, dict):
            values.append(value)
        elif value is not None:
            problems.append(f"line {number} of {path.name} is no object")
    if rest:
        problems.append(f"the last line of {path.name} has no newline")
    return Lines(True, tuple(values), tuple(problems))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _with_constants(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def number(value: Any) -> float | None:
    """A number, also one that was written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


class Telemetry:
    """The lines of an attempt by step. Where a step has several lines, all of them are kept."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.by_step: dict[int, list[Mapping[str, Any]]] = {}
        for line in lines.values:
            step = number(line.get("num_updates"))
            if step is not None and math.isfinite(step):
                self.by_step.setdefault(int(step), []).append(line)

    @property
    def steps(self) -> list[int]:
        """The steps, in the order in which they came first."""
        return list(self.by_step)

    def all(self, step: int, name: str) -> list[float]:
        """The numbers that a field has at a step: one, if there is one line."""
        found = (number(line.get(name)) for line in self.by_step.get(step, ()))
        return [value for value in found if value is not None]

    def one(self, step: int, name: str) -> float | None:
        """The first of them."""
        return next(iter(self.all(step, name)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """An attempt that has ended.

    Attributes:
        name: Of the attempt; its folder has the same name.
        world: The number of ranks.
        codes: By rank: the exit code, or minus the number of the signal.
        trouble: Why the check ended it; empty if it ended by itself.
        config_first: Whether config.json came before the first line of telemetry; None if that is not known.
    """

    name: str
    world: int
    run_dir: Path
    checkpoint_dir: Path
    codes: tuple[int | None, ...]
    trouble: str
    telemetry: Telemetry
    phases: Lines
    config: dict[str, Any] | None
    config_problem: str
    config_first: bool | None
    said: str
    first_line_seconds: float | None
    saved: tuple[tuple[int, Path], ...] = field(default=())

    @property
    def done(self) -> bool:
        """Whether every rank ended with 0."""
        return not self.trouble and all(code == 0 for code in self.codes)

    def how(self) -> str:
        """How it ended, in words, with the last line that it printed."""
        codes = self.trouble or ended(self.codes)
        return f"{codes}{f'; it said: {self.said}' if self.said else ''}"


def ended(codes: Sequence[int | None]) -> str:
    """`exit code 65`, or for several ranks that differ `exit codes 0 and 1`."""
    words = [_code(code) for code in codes]
    if len(set(words)) == 1:
        return words[0]
    return "; ".join(f"rank {rank}: {word}" for rank, word in enumerate(words))


def _code(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"exit code {code}" if code >= 0 else f"ended by signal {-code}"


def checkpoints(folder: Path) -> tuple[tuple[int, Path], ...]:
    """The committed checkpoints of a folder, by step."""
    try:
        return tuple(committed(folder))
    except OSError:
        return ()


def unfinished(folder: Path) -> list[str]:
    """What lies in a checkpoint folder and is no committed checkpoint: a save in flight, or what one left."""
    try:
        return [path.name for path in folder.iterdir() if path.suffix != ".pinned" and not (path / MARKER).exists()]
    except OSError:
        return []


def problem_of(path: Path) -> str:
    """Why a committed checkpoint does not verify. Empty if it does, or if it only equals the save before."""
    try:
        verify(path)
    except CheckpointError as error:
        return "" if error.why.startswith("stale") else error.why
    except OSError as error:
        return str(error)
    return ""


def last_words(log: Path) -> str:
    """The last line that a rank printed, shortened."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()
    except OSError:
        return ""
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The content of config.json, or what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        return None, "there is no config.json"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"config.json cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else (None, "config.json is no object")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file of a checkpoint."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def shares_clock(folder: Path) -> bool:
    """Whether files in a folder get the time of this machine, and not that of a file server."""
    probe, now = folder / ".clock", time.time()
    try:
        probe.touch()
        return abs(probe.stat().st_mtime - now) < 2 * FILE_CLOCK_SECONDS
    except OSError:
        return False


def time_of_marker(path: Path) -> float:
    """When the marker of a checkpoint was written, in seconds since the epoch; infinity if it is gone."""
    try:
        return (path / MARKER).stat().st_mtime
    except OSError:
        return math.inf


def files_named(path: Path) -> int:
    """How many files the manifest of a checkpoint names; 0 if it cannot be read."""
    try:
        return len(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
