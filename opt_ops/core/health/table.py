"""The words of the health table: verbs, scopes, and a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opt_ops.core.values import Verdict

HEALTH_TABLE = "2026-11-22"
"""The table's version. It is in the evidence of every verdict that a row gave."""

AGAIN_SECONDS = 7 * 86400.0
"""Within this, the same on the same part counts as coming again (NVSentinel: a second remediation in 7 days)."""


class Verb(StrEnum):
    """What has to be done about it, mildest first."""

    NONE = "NONE"
    RESTART_APP = "RESTART_APP"
    RESET_GPU = "RESET_GPU"
    REBOOT_NODE = "REBOOT_NODE"
    ISOLATE = "ISOLATE"  # a field diagnostic, a look by a person, a new part


class Scope(StrEnum):
    """When a row applies."""

    ANY = "any"
    IDLE = "idle node"
    RUNNING = "running job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is wrong, what follows, and who says so."""

    reason: str
    signal: str
    verdict: Verdict
    verb: Verb
    source: str
    disagree: str = ""
    scope: Scope = Scope.ANY
    readings: int = 1
    """In a row, two seconds apart, before it counts."""
    again: Verb | None = None
    """What it takes when it comes again on the same part within `AGAIN_SECONDS`."""
    slows: bool = False
    """Whether every rank of the attempt waits for the node."""
    cards: str = "all"
    drivers: str = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict with its reason code and who says so."""

    verdict: Verdict
    reason: str
    source: str
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    drill: str | None = None


def judgement(row: Row, evidence: Mapping[str, Any], again: bool = False, drill: str | None = None) -> Judgement:
    """What a row that applies says; one that comes again is at least suspect."""
    verb, verdict = row.verb, row.verdict
    if again and row.again is not None:
        verb = row.again
        verdict = Verdict.SUSPECT if verdict is Verdict.HEALTHY else verdict
    said = {**evidence, "verb": str(verb), "table": HEALTH_TABLE}
    if again:
        said["again"] = True
    return Judgement(verdict=verdict, reason=row.reason, source=row.source, evidence=said, drill=drill)
