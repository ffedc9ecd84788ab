"""The files of an attempt that its trainer writes, and what the attempt begins with."""

import json
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.contract import manifest
from opt_ops.contract.errors import UserError
from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import Manifest
from opt_ops.contract.options import Options
from opt_ops.contract.phases import PhaseName
from opt_ops.contract.telemetry import LineFile

TELEMETRY_FIELDS = (
    *("ts", "num_updates", "loss", "gnorm", "lr", "betas", "weight_decay", "clip_norm", "finite", "step_seconds"),
    *("tokens", "wps", "data_position"),
)
"""What every line of telemetry has."""

_WHOLE = ("num_updates", "tokens", "data_position")
_MAY_BE_NULL = ("loss", "gnorm")


def starting_point(options: Options, rank: int) -> Manifest | None:
    """The manifest of the checkpoint to continue from; None if the attempt begins at step 0.

    Rank 0 reads every byte of the checkpoint. The others read its manifest.

    Raises:
        CheckpointError: the checkpoint is missing, torn, damaged or stale.
        UserError: there are checkpoints, and neither ``--resume`` nor ``--from-scratch`` was given.
    """
    if options.resume:
        return manifest.verify(options.resume) if rank == 0 else manifest.read(options.resume)
    if options.checkpoint_dir and not options.from_scratch:
        found = manifest.committed(options.checkpoint_dir)
        if found:
            raise UserError(
                f"{options.checkpoint_dir} holds a checkpoint of step {found[-1][0]}: "
                f"continue with --resume {found[-1][1]}, or start over with --from-scratch."
            )
    return None


class RunFolder:
    """Writes ``config.json``, ``telemetry.jsonl`` and ``phases.jsonl``. On other ranks than 0 nothing is written.

    Args:
        options: of this process, with a ``run_dir``.
        rank: of this process.

    Raises:
        UserError: the folder holds the telemetry of another attempt.
        OSError: a file cannot be opened.
    """

    def __init__(self, options: Options, rank: int) -> None:
        if options.run_dir is None:
            raise UserError("--run-dir is missing: the folder of this attempt.")
        self._folder: Path = options.run_dir
        self._attempt = options.attempt
        self._options = options
        self._telemetry = self._phases = None
        self._phase: PhaseName | None = None
        if rank != 0:
            return
        path = self._folder / "telemetry.jsonl"
        if path.exists():
            raise UserError(
                f"{self._folder} holds the telemetry of another attempt: give each attempt a --run-dir of its own."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._telemetry, self._phases = LineFile(path), LineFile(self._folder / "phases.jsonl")
        self.phase(PhaseName.START, None)

    def config(
        self, *, steps: int, schedule: Mapping[str, Any], optimizer: Mapping[str, Any], **others: Any
    ) -> dict[str, Any]:
        """Write ``config.json``, before the first update.

        Args:
            steps: the last step that will be trained.
            schedule: kind and fields, as ``docs/formats.md`` lists them.
            optimizer: ``betas``, ``weight_decay`` and ``clip_norm``.
            others: any other fields.

        Returns:
            What was written.

        Raises:
            OSError: the file cannot be written.
            ValueError: a number is not finite.
        """
        options = self._options
        whole = {
            "v": 1,
            "attempt": self._attempt,
            "recipe": options.recipe,
            "steps": steps,
            "schedule": dict(schedule),
            "lr_factors": [list(pair) for pair in options.lr_factors],
            "skips": [list(pair) for pair in options.skips],
            "optimizer": dict(optimizer),
            "ts": time.time(),
            **others,
        }
        if self._telemetry:
            write_durably(self._folder / "config.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")
        return whole

    def telemetry(self, **fields: Any) -> dict[str, Any]:
        """Append the line of an update, after the update. ``ts`` and ``finite`` may be left out.

        A loss or gradient norm that is not finite becomes ``null``, and ``finite`` false. A gradient norm of None is
        one that the trainer does not have. Numbers of other fields that are not finite become ``null``.

        Returns:
            The line.

        Raises:
            TypeError: a field is missing or of another type; says which.
        """
        fields = {"ts": round(time.time(), 6), "finite": True} | fields
        if missing := [name for name in TELEMETRY_FIELDS if name not in fields]:
            raise TypeError(f"a line of telemetry needs {', '.join(missing)}")
        bad = [name for name in _MAY_BE_NULL if fields[name] is not None and not _is_finite(fields[name], name)]
        line: dict[str, Any] = {name: _plain(value) for name, value in fields.items()}
        for name in TELEMETRY_FIELDS:
            line[name] = _checked(name, fields[name])
        line["finite"] = bool(fields["finite"]) and not bad and line["loss"] is not None
        if self._telemetry:
            self._telemetry.write(line)
        return line

    def phase(self, name: PhaseName | str, step: int | None) -> None:
        """Write that a phase begins, unless the last line says so already. ``step``: the last update; None at start.

        Raises:
            ValueError: there is no phase of that name.
        """
        name = PhaseName(name)
        if self._phases and name != self._phase:
            written = self._phases.write({"ts": round(time.time(), 6), "phase": name, "step": step})
            self._phase = name if written else None


def _checked(name: str, value: Any) -> Any:
    if name == "betas":
        if not _is_list(value):
            raise TypeError(f"`betas` is {value!r}, not a list of numbers")
        return [_number(name, beta) for beta in value]
    if name == "finite":
        if not isinstance(value, bool):
            raise TypeError(f"`finite` is {value!r}, not true or false")
        return value
    if name in _MAY_BE_NULL:
        return _number(name, value) if value is not None and _is_finite(value, name) else None
    number = _number(name, value)
    if name not in _WHOLE:
        return number
    if number != int(number):
        raise TypeError(f"`{name}` is {value!r}, not a whole number")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not _is_finite(value, name):
        raise TypeError(f"`{name}` is {value!r}, not a finite number")
    return float(value)


def _is_finite(value: Any, name: str) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, not a number")
    return math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if _is_list(value):
        return [_plain(each) for each in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        number = float(value)
        return number if math.isfinite(number) else None
    return value
