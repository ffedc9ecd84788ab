"""A reading as a line of telemetry, and how long an update takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from opt_ops.watch_job.reading import Reading


@dataclass(slots=True)
class Pace:
    """How long an update takes, by what lines say or by when they came."""

    slowest: float | None = None
    """The longest time between two of the last 64 lines, by their own stamps; None: they have none."""
    _step: int | None = None
    _at: float | None = None
    _read_at: float | None = None
    _gaps: list[float] = field(default_factory=list[float])

    def seconds(self, reading: Reading, read_at: float | None) -> float | None:
        """Seconds of one update; None: not known. `read_at`: when the line came; None: before the watch began."""
        step, before = reading.step or 0, self._step
        steps = max(1, step - before) if before is not None else 1
        passed = None
        if before is not None:
            if reading.at is not None and self._at is not None:
                passed = reading.at - self._at
            elif read_at is not None and self._read_at is not None:
                passed = read_at - self._read_at
        self._step, self._at, self._read_at = step, reading.at, read_at
        seconds = reading.step_seconds
        if seconds is None and passed is not None and 0 < passed < 1e6:
            seconds = passed / steps
        if passed is not None and reading.at is not None and 0 <= passed < 1e6:
            self._remember(passed)
        return seconds

    def _remember(self, seconds: float) -> None:
        self._gaps = [*self._gaps[-63:], seconds]
        self.slowest = max(self._gaps)


def telemetry_of(reading: Reading, now: float, step_seconds: float | None, *, scaled: bool) -> dict[str, Any]:
    """A line of telemetry, as docs/formats.md says. What the log does not tell is null."""
    known = reading.loss is not None and math.isfinite(reading.loss)
    gnorm = reading.gnorm
    skipped = reading.skipped_updates > 0 and not reading.nan_updates and not known
    return {
        "ts": reading.at if reading.at is not None else now,
        "num_updates": reading.step,
        "loss": reading.loss if known else None,
        "gnorm": gnorm if gnorm is not None and math.isfinite(gnorm) else None,
        "lr": reading.lr if reading.lr is not None and math.isfinite(reading.lr) and reading.lr >= 0 else None,
        "betas": None,
        "weight_decay": None,
        "clip_norm": None,
        "finite": known and (gnorm is None or math.isfinite(gnorm)),
        "step_seconds": step_seconds,
        "tokens": reading.tokens,
        "wps": reading.tokens_per_second,
        **({"loss_scale": reading.loss_scale} if scaled else {}),
        **({"skip": "overflow"} if skipped else {}),
        **({"bsz": reading.batch} if reading.batch else {}),
    }
