"""Proposals in a report."""

from __future__ import annotations

from dataclasses import dataclass

from chronicles.record import Moment
from opt_ops.core.values import AskDefault, ProposalStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalReport:
    """What a person was asked before it was done, and the answer."""

    proposal: str
    made: Moment
    deadline: Moment
    default: AskDefault
    status: ProposalStatus
    answered: Moment | None
    author: str | None  # None: nobody answered
    reason: str
    steps_waited: int | None  # trained between the proposal and its answer
