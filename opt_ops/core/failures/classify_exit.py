"""Why a rank ended: its exit code, its signal and the last lines of its log → a failure class.

The lines are the programs' own words, looked for in the order of the table: what names a cause comes before what only
tells that a peer was lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from opt_ops.core.values import RankExit

# The trainer's exit codes (docs/formats.md) that name their own failure class.
_CLASS_OF_CODE = {
    65: "checkpoint_refused",
    78: "user_error",
    82: "non_finite_loss",
    84: "out_of_memory",
    85: "silent_data_corruption",
    86: "loss_scale_floor",
    87: "communication",  # another rank's data is corrupt
}

_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("out_of_memory", re.compile(r"CUDA out of memory|OutOfMemoryError|oom-kill|MemoryError|Cannot allocate memory")),
    ("gpu_error", re.compile(r"uncorrectable ECC|CUDA error: (?:an illegal|unspecified|hardware)|GPU is lost|Xid")),
    ("storage", re.compile(r"No space left on device|Stale file handle|Input/output error|Disk quota exceeded")),
    (
        "communication",
        re.compile(
            r"NCCL (?:error|WARN)|ncclSystemError|ncclRemoteError|Watchdog caught collective|"
            r"Connection (?:reset|closed|refused) by peer|gloo.*(?:timed out|EnforceNotMet)|DistNetworkError"
        ),
    ),
)

CONSEQUENCES = frozenset({"communication"})
"""What ranks say when another one has gone: the first to fail is looked for among the rest."""


def classify(ended: RankExit, tail: str) -> tuple[str, str]:
    """The failure class of a rank that ended badly, and the line of its log that says so (untrusted; may be empty)."""
    kind = _CLASS_OF_CODE.get(ended.code or 0)
    for name, words in _WORDS:
        for line in reversed(tail.splitlines()):
            if words.search(line):
                return kind or name, line.strip()
    return kind or "process_death", _last_error(tail)


def first_to_fail(failed: Mapping[RankExit, str]) -> RankExit:
    """The culprit: the earliest, those aside that only say that a peer was lost."""
    return min(failed, key=lambda ended: (classify(ended, failed[ended])[0] in CONSEQUENCES, ended.at))


def _last_error(tail: str) -> str:
    """A traceback's last line; empty if there is none."""
    lines = [line for line in tail.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.match(r"(?:[\w.]+(?:Error|Exception)\b|error:|fatal)", line)), ""
    )
