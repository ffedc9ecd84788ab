"""From the reports on ranks that ended badly to the evidence of an incident."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from opt_ops.core.failures.cause_lines import CauseLine
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.failures.classify_exit import Blame, last_words
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.values import RankExit
from opt_ops.ports import NodeRanksReport

_MOST_LOST = 1024
"""Ranks that the evidence names. Of so many nothing is replaced in place."""
_SURVIVED_SECONDS = 30.0
"""A line that is older than the last step by more than this is no cause: training went on after it. Clocks of nodes
differ by less, and a rank may have failed within the step that another rank still reported."""


def failed_ranks(reports: Iterable[NodeRanksReport], last_step_at: float | None) -> dict[RankExit, str]:
    """The ranks that did not end with code 0, each with the lines of its log that may say why.

    `last_step_at`: when the last step was trained, in seconds since the epoch.
    """
    failed: dict[RankExit, str] = {}
    for report in reports:
        for ended in report.exits:
            if ended.code == 0 and ended.signal is None:
                continue
            lines = report.causes.get(ended.rank)
            if lines is None:  # an agent of an older version
                failed[ended] = report.tails.get(ended.rank, "")
            else:
                failed[ended] = last_words(ended, (_aged(line, last_step_at) for line in lines))
    return failed


def present(attempt: Attempt, report: NodeRanksReport) -> NodeRanksReport:
    """What a report says of the present generation: how a process ended that was replaced is history."""
    if not attempt.members:
        return report
    here = frozenset(attempt.ranks_on([report.node]))
    exits = tuple(each for each in report.exits if each.rank in here and not attempt.replaced_since(each))
    return replace(report, exits=exits, done=here <= {each.rank for each in exits})


def losses_of(failed: Iterable[RankExit]) -> dict[str, Any]:
    """Which ranks are lost, and with which exit codes, for a replacement in place."""
    ended = sorted(failed, key=lambda each: each.rank)[:_MOST_LOST]
    codes = {each.code for each in ended if each.code is not None}
    return {"lost_ranks": [each.rank for each in ended], "codes": sorted(codes)}


def _aged(line: CauseLine, last_step_at: float | None) -> CauseLine:
    if last_step_at is None or line.at is None or line.at >= last_step_at - _SURVIVED_SECONDS:
        return line
    return replace(line, stale=True)


def places(found: Blame) -> tuple[str, ...]:
    """Where the incident happened: the node of the first rank. None, if ranks of several nodes failed in the same way.

    Of ranks that lost a peer the first is named all the same: the next failure shows whether it is the same one again.
    """
    if len(found.nodes) > 1 and found.kind is not FailureClass.COMMUNICATION:
        return ()
    return (found.first.node,)


def evidence_of(found: Blame, failed: int) -> dict[str, Any]:
    """What an incident keeps of it. `failed`: how many ranks ended badly."""
    first = found.first
    evidence: dict[str, Any] = {
        "rank": first.rank,
        "code": first.code,
        "signal": first.signal,
        "failed_ranks": failed,
        "place": first.node,
        "node": found.node,
        "fault": str(found.fault),
        "alike_ranks": found.ranks,
        "alike_nodes": len(found.nodes),
    }
    return {**evidence, "line": found.line} if found.line else evidence
