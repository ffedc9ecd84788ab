"""How a watched job ended: the scheduler's word, and the lines of its log that name a cause."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.cause_lines import CauseLines
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.failures.classify_exit import blame, last_words
from opt_ops.core.failures.families import Fault, Weight
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.values import PREEMPTED, RankExit, Tier
from opt_ops.watch_job.job import JobRecord

SUSPENDED_SECONDS = 600.0  # as the daemon's: time slices of gang scheduling take half a minute

_OF_WORD: Mapping[str, FailureClass] = {
    "TIMEOUT": FailureClass.TIME_LIMIT,
    "DEADLINE": FailureClass.TIME_LIMIT,
    PREEMPTED: FailureClass.PREEMPTION,
    "CANCELLED": FailureClass.JOB_CANCELLED,
    "REVOKED": FailureClass.JOB_CANCELLED,
    "OUT_OF_MEMORY": FailureClass.OUT_OF_MEMORY,
    "NODE_FAIL": FailureClass.ALLOCATION_LOST,
    "BOOT_FAIL": FailureClass.ALLOCATION_LOST,
    "LAUNCH_FAILED": FailureClass.ALLOCATION_LOST,
    "RECONFIG_FAIL": FailureClass.ALLOCATION_LOST,
}
"""What Slurm's word for an end is. For any other word but COMPLETED, the log says what it was."""


def why_job_ended(
    attempt: Attempt, last: Point | None, record: JobRecord, gone: bool, causes: CauseLines
) -> SignalRaised | None:
    """The finding of a job that has ended; None if it completed.

    `gone`: Slurm knows it no more, so how it ended is not known.
    """
    if record.word == "COMPLETED" and not gone:
        return None
    lines = [each.line for each in causes.found]
    if gone:
        how, kind, line, fault = (
            "has ended, and Slurm does not say how",
            FailureClass.ALLOCATION_LOST,
            "",
            Fault.UNCLEAR,
        )
    else:
        how = f"ended {record.word}{_exit_of(record)}"
        kind, line, fault = _kind_of(record, causes)
    at = f" at step {last.step:,}" if last else ""
    evidence: dict[str, Any] = {
        "job": f"job {record.number} {how}{at}",
        "code": record.code,
        "signal": record.signal,
        "line": line,
        "fault": str(fault),
        "node": None,
        "lines": [each.text for each in lines if not each.stale][:4],
    }
    return _signal(attempt, last, kind, "the scheduler reports that the job has ended", evidence)


def _exit_of(record: JobRecord) -> str:
    if record.signal:
        return f" (signal {record.signal})"
    return f" (exit code {record.code})" if record.code else ""


def _kind_of(record: JobRecord, causes: CauseLines) -> tuple[FailureClass, str, Fault]:
    """The class, the line that says so, and whose fault it is."""
    code = record.code if record.code is not None and record.code > 128 else 1  # smaller ones mean nothing in common
    ended = RankExit(rank=0, node="", code=None if record.signal else code, signal=record.signal, at=0.0)
    found = blame({ended: last_words(ended, [each.line for each in causes.found])})
    kind = _OF_WORD.get(record.word)
    return (found.kind if kind is None else kind), found.line, found.fault


def why_log_ends(attempt: Attempt, last: Point | None, causes: CauseLines) -> SignalRaised | None:
    """The finding of a log that ends with an error, and no training line behind it; None: it does not."""
    fresh = [each for each in causes.found if not each.line.stale and each.family.weight is not Weight.WARNING]
    if not fresh:
        return None
    ended = RankExit(rank=0, node="", code=1, signal=None, at=0.0)
    found = blame({ended: last_words(ended, [each.line for each in fresh])})
    evidence: dict[str, Any] = {
        "job": f"the log ends with an error{f' after step {last.step:,}' if last else ''}",
        "line": found.line or fresh[0].line.text,
        "fault": str(found.fault),
        "node": None,
    }
    return _signal(attempt, last, found.kind, "an error is in the log, and no training line behind it", evidence)


def suspended(attempt: Attempt, record: JobRecord, seconds: float) -> SignalRaised:
    """The finding of a job that the scheduler has stopped for long."""
    evidence = {"job": record.number, "seconds": seconds}
    rule = f"the scheduler has suspended the job for {SUSPENDED_SECONDS / 60:g} minutes"
    return _signal(attempt, None, FailureClass.SUSPENDED, rule, evidence)


def _signal(
    attempt: Attempt, last: Point | None, kind: FailureClass, rule: str, evidence: Mapping[str, Any]
) -> SignalRaised:
    step = last.step if last else attempt.last_step
    return SignalRaised(
        signal=kind,
        tier=Tier.ACT,
        attempt=attempt.name,
        step=step,
        onset_step=None,
        at=time.time(),
        rule=rule,
        evidence=evidence,
    )
