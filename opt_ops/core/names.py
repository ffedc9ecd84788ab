"""Names of lineages, runs, attempts, incidents, log entries and alerts: `12`, `12.01-a3`, `12-i003/opened`."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

_ID = re.compile(r"(?P<lineage>\d+)(?:\.(?P<run>\d{2,})(?:-a(?P<attempt>\d+))?|-i\d{3,}(?:-p\d+)?|-e\d+)?")

PROBE = re.compile(r"(?P<incident>[A-Za-z0-9_]+-i\d{3,})-(?P<kind>[a-z_]+)")
"""The name of a probe."""

EVALUATION = re.compile(r"[A-Za-z0-9_]+-ev\d{3,}")
"""The name of an evaluation that the daemon ordered."""


def run_name(lineage: str, number: int) -> str:
    """`12`, 1 → `12.01`."""
    return f"{lineage}.{number:02d}"


def attempt_name(run: str, number: int) -> str:
    """`12.01`, 3 → `12.01-a3`."""
    return f"{run}-a{number}"


def probe_name(incident: str, kind: str) -> str:
    """`12-i003`, `same_data` → `12-i003-same_data`."""
    return f"{incident}-{kind}"


def proposal_name(incident: str, number: int) -> str:
    """`12-i007`, 1 → `12-i007-p1`: the first proposal about an incident."""
    return f"{incident}-p{number}"


def evaluation_name(lineage: str, number: int) -> str:
    """`12`, 1 → `12-ev001`: an evaluation of a checkpoint that the daemon ordered."""
    return f"{lineage}-ev{number:03d}"


def pin_holder(lineage: str) -> str:
    """`12` → `lineage-12`: a fork, as the one that needs a checkpoint of its parent."""
    return f"lineage-{lineage}"


def attempt_folder(attempt: str) -> str:
    """The folder in that of the lineage: `12.01-a3` → `12.01/a3`, a probe `12-i003-x` → `probes/12-i003/x`."""
    if (probe := PROBE.fullmatch(attempt)) is not None:
        return f"probes/{probe['incident']}/{probe['kind']}"
    run, _, number = attempt.partition("-")
    return f"{run}/{number}"


def lineage_of(identifier: str) -> str:
    """The lineage that `12`, `12.01`, `12.01-a3`, `12-i003`, `12-i003-p1` or `12-e57` belongs to.

    Raises:
        ValueError: it is none of these.
    """
    match = _ID.fullmatch(identifier)
    if match is None:
        raise ValueError(f"{identifier!r} is no lineage (12), run (12.01), attempt (12.01-a3) or incident (12-i003)")
    return match["lineage"]


class AlertTopic(StrEnum):
    """What an alert is about. Of others, the topic is a signal's key or the status that a lineage ended with."""

    HALTED = "halted"  # a lineage, since a time
    WAITING = "waiting"  # a lineage, since a time
    JOB_UNKNOWN = "job_unknown"  # the job of a lineage, since a time
    OPENED = "opened"  # an incident
    FELL_BACK = "fell_back"  # an incident whose ranks were not replaced in place, although that was tried
    CLOSED = "closed"  # an incident
    ASKED = "asked"  # a proposal that waits for an answer
    EVALUATION = "evaluation"  # a checkpoint whose evaluation is not tried again
    SCORE_FELL = "score_fell"  # two evaluations, the newer one of which is worse
    OTHER_DATA = "other_data"  # an attempt that trains on other data than before, which nobody asked for
    BLIND = "blind"  # a part of the watch that fails, or a file whose format is another, since a time


class AlertName(NamedTuple):
    """The parts of an alert's id."""

    subject: str  # a lineage or an incident
    topic: str
    since: str  # seconds since the epoch; empty where the topic has no time


def alert_id(subject: str, topic: str, since: float | None = None) -> str:
    """`12-i003`, `opened` → `12-i003/opened`; `12`, `halted`, 1795.5 → `12/halted/1795.500`. One alert has one id."""
    return f"{subject}/{topic}" if since is None else f"{subject}/{topic}/{since:.3f}"


def parse_alert_id(text: str) -> AlertName:
    """The inverse of `alert_id`. A text that is no such id has an empty topic."""
    subject, _, topic = text.partition("/")
    timed = re.fullmatch(rf"({AlertTopic.HALTED}|{AlertTopic.WAITING})/(\d+\.\d+)", topic)
    return AlertName(subject, timed[1], timed[2]) if timed else AlertName(subject, topic, "")
