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
from opt_ops.contract.phases import PhaseFile, PhaseName
from opt_ops.contract.telemetry import LineFile

TELEMETRY_FIELDS = (
    *("ts", "num_updates", "loss", "gnorm", "lr", "betas", "weight_decay", "clip_norm", "finite", "step_seconds"),
    *("tokens", "wps", "data_position"),
)
"""What every line of telemetry has."""

_FILLED_IN = ("ts", "finite", "step_seconds", "wps")
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
        require_no_checkpoints(options.checkpoint_dir)
    return None


def require_no_checkpoints(folder: Path) -> None:
    """Nobody starts over in silence.

    Raises:
        UserError: ``folder`` holds a committed checkpoint or snapshot.
    """
    if present := sorted(manifest.committed(folder) + manifest.committed(folder, "snapshot")):
        step, path = present[-1]
        raise UserError(
            f"{folder} holds a checkpoint of step {step}: continue with --resume {path}, "
            "or start over with --from-scratch."
        )


def require_new_run_folder(folder: Path) -> None:
    """Two attempts do not write into one telemetry.

    Raises:
        UserError: ``folder`` holds the telemetry of another attempt.
    """
    if (folder / "telemetry.jsonl").exists():
        raise UserError(f"{folder} holds the telemetry of another attempt: give each attempt a --run-dir of its own.")


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
        self._telemetry, self._phases = None, PhaseFile(None)
        self._last_line = time.monotonic()
        self._last_tokens: int | None = None
        if rank != 0:
            return
        require_new_run_folder(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._telemetry = LineFile(self._folder / "telemetry.jsonl")
        self._phases = PhaseFile(self._folder / "phases.jsonl")
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
            TypeError: a value has no form in JSON.
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
        self._last_line = time.monotonic()
        if self._telemetry:
            write_durably(
                self._folder / "config.json", json.dumps(whole, indent=1, allow_nan=False, default=_as_json) + "\n"
            )
        return whole

    def telemetry(self, **fields: Any) -> dict[str, Any]:
        """Append the line of an update, after the update.

        A loss or gradient norm that is not finite becomes ``null``, and ``finite`` false. With a ``loss_scale`` (fp16)
        a gradient norm that is not finite is an overflow, and ``finite`` stays true. A gradient norm of None is one
        that the trainer does not have. Numbers of other fields that are not finite become ``null``. Scalars of NumPy
        and PyTorch are numbers, too.

        These may be left out: ``ts``, ``finite``, ``step_seconds`` (since the line before, or since
        :meth:`config`) and ``wps`` (tokens per second since then).

        Returns:
            The line.

        Raises:
            TypeError: a field is missing or of another type; says which.
        """
        given = {name: _scalar(value) for name, value in fields.items()}
        if missing := [name for name in TELEMETRY_FIELDS if name not in given and name not in _FILLED_IN]:
            raise TypeError(f"a line of telemetry needs {', '.join(missing)}")
        speed = self._speed(_checked("num_updates", given["num_updates"]), _checked("tokens", given["tokens"]))
        fields = {"ts": round(time.time(), 6), "finite": True} | speed | given
        bad = [name for name in _MAY_BE_NULL if fields[name] is not None and not _is_finite(fields[name], name)]
        if fields.get("loss_scale") is not None and "gnorm" in bad:
            bad.remove("gnorm")
        line: dict[str, Any] = {name: _plain(value) for name, value in fields.items()}
        for name in TELEMETRY_FIELDS:
            line[name] = _checked(name, fields[name])
        line["finite"] = bool(fields["finite"]) and not bad and line["loss"] is not None
        if self._telemetry:
            self._telemetry.write(line)
        return line

    def _speed(self, updates: int, tokens: int) -> dict[str, float]:
        """Seconds since the line before, and tokens per second. The first update had as many as the average one."""
        now = time.monotonic()
        since = tokens / max(updates, 1) if self._last_tokens is None else tokens - self._last_tokens
        seconds, self._last_line, self._last_tokens = max(now - self._last_line, 1e-9), now, tokens
        return {"step_seconds": seconds, "wps": since / seconds}

    def phase(self, name: PhaseName | str, step: int | None, *, again: bool = False) -> None:
        """Write that a phase begins, unless the last line says so already.

        Args:
            name: of the phase.
            step: the last update; None at start.
            again: write the line in any case. It shows that the phase makes progress.

        Raises:
            ValueError: there is no phase of that name.
        """
        self._phases.enter(name, step, again=again)


def _checked(name: str, value: Any) -> Any:
    if name == "betas":
        if not _is_list(value):
            raise TypeError(f"`betas` is {value!r}, not a list of numbers")
        return [_number(name, _scalar(beta)) for beta in value]
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
    try:
        return math.isfinite(value)
    except OverflowError:
        raise TypeError(f"`{name}` is a whole number of more than 300 digits") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _scalar(value: Any) -> Any:
    """The Python number in a scalar of NumPy, or in a tensor of one element. Anything else as it is."""
    if isinstance(value, bool | int | float | str | None) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several elements
        return value


def _as_json(value: Any) -> Any:
    """For what the module json does not know: scalars of arrays and tensors, and paths."""
    if isinstance(value, Path):
        return str(value)
    if (plain := _scalar(value)) is value:
        raise TypeError(f"{value!r} has no form in JSON")
    return plain


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite become None."""
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if _is_list(value):
        return [_plain(each) for each in value]
    if isinstance(value, numbers.Real) and not isinstance(value, bool | int):
        number = float(value)
        return number if math.isfinite(number) else None
    return value
