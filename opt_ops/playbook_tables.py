"""The tables of a playbook page's head that set the numbers of detectors. An unknown key is an error."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from opt_ops.core.failures.classes import FailureClass


class Table(BaseModel):
    """A table of a page's head."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Spike(Table):
    alert: Annotated[float, Field(gt=0)]
    act: Annotated[float, Field(gt=0)]
    heal_steps: Annotated[int, Field(ge=1)]
    patience: Annotated[int, Field(ge=16)]
    gnorm_deviations: Annotated[float, Field(gt=0)]


class _Drift(Table):
    settle: Annotated[int, Field(ge=16)]
    low: Annotated[float, Field(gt=0)]
    low_sd: Annotated[float, Field(gt=0)]
    low_stays: Annotated[int, Field(ge=1)]
    stall: Annotated[int, Field(ge=1)]


class _Hang(Table):
    multiple: Annotated[float, Field(gt=1)]
    floor_seconds: Annotated[float, Field(gt=0)]
    startup_seconds: Annotated[float, Field(gt=0)]


class _Silence(Table):
    seconds: Annotated[float, Field(gt=0)]


class _Straggler(Table):
    ratio: Annotated[float, Field(gt=1)]
    persist: Annotated[int, Field(ge=1)]
    slight: Annotated[float, Field(gt=1)]
    waits_seconds: Annotated[float, Field(gt=0)]


class _Throughput(Table):
    width: Annotated[int, Field(ge=2)]
    drop: Annotated[float, Field(gt=0, lt=1)]
    ratio: Annotated[float, Field(gt=1)]
    share: Annotated[float, Field(gt=0.5, le=1)]


class _LossScale(Table):
    overflows: Annotated[int, Field(ge=2)]
    refill: Annotated[int, Field(ge=1)]
    fall: Annotated[float, Field(gt=1)]
    within: Annotated[int, Field(ge=2)]
    warm: Annotated[int, Field(ge=0)]


class _Capacity(Table):
    shrink_seconds: Annotated[float, Field(gt=0)]
    grow_seconds: Annotated[float, Field(gt=0)]
    top_up_seconds: Annotated[float, Field(gt=0)]
    successor_seconds: Annotated[float, Field(gt=0)]
    last_call_seconds: Annotated[float, Field(gt=0)]
    leave_seconds: Annotated[float, Field(gt=0)]
    page_seconds: Annotated[float, Field(gt=0)]


class _Limits(Table):
    actions: Annotated[int, Field(ge=1)]
    hours: Annotated[float, Field(gt=0)]
    refill_steps: Annotated[int, Field(ge=0)] | None = None
    cordon_per_hour: Annotated[int, Field(ge=1)]


DETECTORS: dict[str, type[Table]] = {
    FailureClass.LOSS_SPIKE: _Spike,
    FailureClass.LOSS_DRIFT: _Drift,
    FailureClass.HANG: _Hang,
    FailureClass.SILENT_NODE: _Silence,
    FailureClass.STRAGGLER: _Straggler,
    FailureClass.THROUGHPUT_DROP: _Throughput,
    FailureClass.LOSS_SCALE_FLOOR: _LossScale,
    "capacity": _Capacity,
    FailureClass.UNKNOWN: _Limits,
}
"""By the name of the page that must set them."""
