"""Why a rank ended: its exit code, its signal and the last lines of its log → a failure class.

The lines are the programs' own words, looked for in the order of the table: what names a cause comes before what only
tells that a peer was lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.failures.classes import ROWS, FailureClass
from opt_ops.core.values import RankExit

CLASS_OF_CODE: Mapping[int, FailureClass] = {
    ExitCode.CHECKPOINT_REFUSED: FailureClass.CHECKPOINT_REFUSED,
    ExitCode.USER_ERROR: FailureClass.USER_ERROR,
    ExitCode.NOT_FINITE: FailureClass.NON_FINITE_LOSS,
    ExitCode.OUT_OF_MEMORY: FailureClass.OUT_OF_MEMORY,
    ExitCode.CORRUPT_DATA: FailureClass.SILENT_DATA_CORRUPTION,
    ExitCode.LOSS_SCALE_FLOOR: FailureClass.LOSS_SCALE_FLOOR,
    ExitCode.PEER_CORRUPT_DATA: FailureClass.COMMUNICATION,
}
"""The trainer's exit codes that name a failure class of their own."""

_WORDS: tuple[tuple[FailureClass, re.Pattern[str]], ...] = (
    (
        FailureClass.OUT_OF_MEMORY,
        re.compile(r"CUDA out of memory|OutOfMemoryError|oom-kill|MemoryError|Cannot allocate memory"),
    ),
    (
        FailureClass.GPU_ERROR,
        re.compile(r"uncorrectable ECC|CUDA error: (?:an illegal|unspecified|hardware)|GPU is lost|Xid"),
    ),
    (
        FailureClass.STORAGE,
        re.compile(r"No space left on device|Stale file handle|Input/output error|Disk quota exceeded"),
    ),
    (
        FailureClass.COMMUNICATION,
        re.compile(
            r"NCCL (?:error|WARN)|ncclSystemError|ncclRemoteError|Watchdog caught collective|"
            r"Connection (?:reset|closed|refused) by peer|gloo.*(?:timed out|EnforceNotMet)|DistNetworkError"
        ),
    ),
)


def classify(ended: RankExit, tail: str) -> tuple[FailureClass, str]:
    """The failure class of a rank that ended badly, and the line of its log that says so (untrusted; may be empty)."""
    kind = CLASS_OF_CODE.get(ended.code or 0)
    for name, words in _WORDS:
        for line in reversed(tail.splitlines()):
            if words.search(line):
                return kind or name, line.strip()
    return kind or FailureClass.PROCESS_DEATH, _last_error(tail)


def first_cause(failed: Mapping[RankExit, str]) -> RankExit:
    """The earliest rank whose failure is its own; where all only report a lost peer, the earliest of all."""
    return min(failed, key=lambda ended: (ROWS[classify(ended, failed[ended])[0]].secondary, ended.at))


def _last_error(tail: str) -> str:
    """A traceback's last line; empty if there is none."""
    lines = [line for line in tail.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.match(r"(?:[\w.]+(?:Error|Exception)\b|error:|fatal)", line)), ""
    )
