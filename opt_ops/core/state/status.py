"""Where a lineage stands, and which status may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Status(StrEnum):
    """Where a lineage stands."""

    NEW = "NEW"  # a folder with a request in it; nothing is journaled yet
    PLANNED = "PLANNED"  # the first run has its settings
    QUEUED = "QUEUED"  # nodes were asked for
    PREFLIGHT = "PREFLIGHT"  # nodes are held; waiting until enough of them report and are fit
    STARTING = "STARTING"  # ranks were ordered; no step yet
    TRAINING = "TRAINING"  # steps come
    ROLLING_BACK = "ROLLING_BACK"  # a rollback was decided
    RECOVERING = "RECOVERING"  # a restart without rollback was decided
    PAUSED = "PAUSED"  # an operator wants it to rest
    COMPLETED = "COMPLETED"  # every step is trained
    HALTED = "HALTED"  # no rule fits or a budget is spent: a human was called
    CANCELLED = "CANCELLED"  # an operator stopped it


ENDED = frozenset({Status.COMPLETED, Status.HALTED, Status.CANCELLED})


_RECOVERY = frozenset({Status.ROLLING_BACK, Status.RECOVERING})


_WAY_BACK = frozenset({Status.QUEUED, Status.PREFLIGHT, Status.STARTING})  # to training


_OUT = _RECOVERY | ENDED | {Status.PAUSED}


TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.NEW: frozenset({Status.PLANNED}),
    Status.PLANNED: frozenset({Status.QUEUED, Status.STARTING}) | _OUT,
    Status.QUEUED: _WAY_BACK | _OUT,
    Status.PREFLIGHT: _WAY_BACK | _OUT,
    Status.STARTING: _WAY_BACK | {Status.TRAINING} | _OUT,
    Status.TRAINING: _WAY_BACK | _OUT,  # the way back: after an attempt that left to make room for the next
    Status.ROLLING_BACK: _WAY_BACK | _OUT,
    Status.RECOVERING: _WAY_BACK | _OUT,
    Status.PAUSED: _WAY_BACK | _OUT,
    Status.COMPLETED: frozenset(),
    Status.HALTED: frozenset({Status.CANCELLED, Status.RECOVERING}),  # an operator resumes it
    Status.CANCELLED: frozenset(),
}


class IllegalTransition(ValueError):
    """An event that cannot follow: a fault of ours, raised before the event is journaled."""
