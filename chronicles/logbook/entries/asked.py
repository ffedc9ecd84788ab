"""What the logbook says of proposals: when a person was asked, who answered, and how long that took."""

from __future__ import annotations

from chronicles.report.model import IncidentReport
from chronicles.report.proposal import ProposalReport
from chronicles.wording import count, duration, full, second, short
from opt_ops.core.values import AskDefault, ProposalStatus


def asked(row: IncidentReport) -> str:
    """Every proposal of an incident with its answer, in sentences; empty where nobody was asked."""
    return " ".join(map(_proposal, row.proposals))


def _proposal(each: ProposalReport) -> str:
    begins = f"{each.proposal} was proposed at {second(each.made)}"
    if each.answered is None:
        return f"{begins}. It waits for an answer until {second(each.deadline)}; without one, {_then(each)}."
    at = second(each.answered)
    match each.status:
        case ProposalStatus.WITHDRAWN:
            return full(f"{begins} and withdrawn at {at}: {short(each.reason, 200)}")
        case ProposalStatus.EXPIRED:
            return f"{begins}. Nobody answered by {at} ({_waited(each)}), so {_then(each)}."
        case _:
            why = f": “{short(each.reason, 200)}”" if each.reason else ""
            return full(f"{begins}, {each.status} by {each.author} at {at} ({_waited(each)}){why}")


def _then(each: ProposalReport) -> str:
    return "it is done" if each.default is AskDefault.ACT else "it is not done"


def _waited(each: ProposalReport) -> str:
    seconds = (each.answered or each.made) - each.made
    steps = f", {count(each.steps_waited, 'step')}" if each.steps_waited is not None else ""
    return f"{duration(seconds)} of waiting{steps}"
