"""Events: what is proposed to a person before it is done, and the answer."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.events.incidents import RecoveryDecided
from opt_ops.core.values import AskDefault, ProposalStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalMade:
    """Decision: what a playbook would do about an incident. It is done once a person approves it.

    `default` is what happens at `deadline` (seconds since the epoch) if nobody has answered. `due` is the deadline by
    the monotonic clock of the daemon's host, which counts from the boot `boot`: nobody sets that clock.
    """

    proposal: str  # such as 12-i007-p1
    incident: str
    decided: RecoveryDecided
    default: AskDefault
    deadline: float
    trains: bool  # training goes on while it waits
    step: int | None  # the newest one then
    boot: str = ""  # empty: not known
    due: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalAnswered:
    """Observation: a person has answered, or the deadline has passed. Decision: what was shown no longer holds.

    A proposal has one answer: the first one that is journaled.
    """

    proposal: str
    incident: str
    status: ProposalStatus
    reason: str = ""
    step: int | None = None  # the newest one then
    author: str | None = None  # None: nobody answered
    request: str | None = None
