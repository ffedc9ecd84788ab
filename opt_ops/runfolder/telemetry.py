"""Reads a line of telemetry.jsonl. A module of its own: commands that only read telemetry import nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from opt_ops.contract.telemetry import ChecksumFields, TelemetryLine
from opt_ops.core.detect.point import Busy, ChecksumComparison, Point


def point_of(line: Mapping[str, Any]) -> Point:
    """Return a line of telemetry as a point.

    Raises:
        KeyError, TypeError, ValueError: the line is not as docs/formats.md says.
    """
    fields = cast("TelemetryLine", line)  # so that pyright checks the names; values are not checked here
    return Point(
        step=fields["num_updates"],
        ts=fields["ts"],
        loss=fields["loss"],
        gnorm=fields["gnorm"],
        lr=fields["lr"],
        betas=tuple(fields["betas"]),
        weight_decay=fields["weight_decay"],
        clip_norm=fields["clip_norm"],
        step_seconds=fields["step_seconds"],
        tokens=fields["tokens"],
        wps=fields["wps"],
        finite=fields["finite"],
        save_seconds=fields.get("save_seconds", 0.0),
        save_error=fields.get("save_error"),
        loss_scale=fields.get("loss_scale"),
        skip=fields.get("skip"),
        bad_module=fields.get("bad_module"),
        actv_norm=fields.get("actv_norm"),
        busy=Busy(**busy) if (busy := fields.get("busy_seconds")) else None,
        checksums=_comparison_of(compared) if (compared := fields.get("checksums")) else None,
        valid=_losses_of(losses) if (losses := fields.get("valid")) else None,
    )


def _comparison_of(fields: ChecksumFields) -> ChecksumComparison:
    ranks = tuple(int(rank) for rank in fields["ranks"])
    return ChecksumComparison(ranks=ranks, certain=bool(fields["certain"]), what=str(fields["what"]))


def _losses_of(fields: Mapping[str, float | None]) -> dict[str, float | None]:
    return {str(corpus): None if loss is None else float(loss) for corpus, loss in fields.items()}
