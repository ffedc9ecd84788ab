"""Which node a failed rank makes suspect: place before node.

A rank's log tells of an error, not of its cause. A fault of the program looks like one of the machine, but it comes
back at the same step wherever the program runs. So the same failure takes at most one node out, and at its third time
a person is asked.
"""

from __future__ import annotations

from opt_ops.core.decide.retry_budget import failure_step, spends_budget
from opt_ops.core.failures.cause_lines import fingerprint
from opt_ops.core.failures.classes import Blames, FailureClass, row
from opt_ops.core.failures.families import Fault
from opt_ops.core.state.model import Incident, Node, State
from opt_ops.core.values import Verdict

SAME_STEPS = 2
"""Two failures this close are at one step: rank 0 reports steps, and another rank may fail before or after its line."""

_TRIES = 3
_JUDGED = frozenset({FailureClass.PROCESS_DEATH, FailureClass.GPU_ERROR})
"""Classes that say little about the cause. Others stop at the same step by their own ladders."""
_MAYBE_THE_NODE = frozenset({Fault.UNCLEAR, Fault.PEER, Fault.NETWORK})
"""Faults for which a node may be left out to see whether the failure stays there, though the logs blame none."""
_PROGRAM_XIDS = frozenset({13, 31, 43, 45})
"""Xids that tell of a program more often than of a card: NVIDIA's catalogue lists "user application" as their cause."""


def same_failures(state: State, incident: Incident) -> list[Incident]:
    """Earlier incidents of the same class, with the same words, at the same step; those of drills do not count."""
    if "rank" not in incident.evidence:
        return []
    step, words = failure_step(state, incident), _words(incident)
    return [
        other
        for other in state.incidents.values()
        if other.name != incident.name
        and other.kind == incident.kind
        and "rank" in other.evidence
        and spends_budget(other)
        and abs(failure_step(state, other) - step) <= (SAME_STEPS if words else 0)
        and _words(other) == words
    ]


def _words(incident: Incident) -> str:
    return fingerprint(str(incident.evidence.get("line") or ""))


def _place(incident: Incident) -> str:
    return str(incident.evidence.get("place") or ", ".join(incident.nodes))


def nodes_to_exclude(state: State, incident: Incident) -> tuple[str, ...]:
    """The nodes of the incident, as far as its evidence is against them."""
    evidence = incident.evidence
    if "rank" not in evidence or "fault" not in evidence:
        return incident.nodes  # another detector measured them, or an older version did not say more
    if evidence.get("node") is None and evidence["fault"] not in _MAYBE_THE_NODE:
        return ()
    xids = evidence.get("xids") or ()
    if evidence["fault"] == Fault.UNCLEAR and xids and _PROGRAM_XIDS.issuperset(xids):
        return ()
    if any(_place(other) != _place(incident) for other in same_failures(state, incident)):
        return ()
    return incident.nodes


def program_fails(state: State, incident: Incident) -> str | None:
    """Why the program is suspected: one failure at one step for the third time. None: it may be the machine."""
    if incident.kind not in _JUDGED or not _words(incident):
        return None  # a death without a word can have any cause; its ladder ends at the fourth time
    same = same_failures(state, incident)
    if len(same) < _TRIES - 1:
        return None
    places = list(dict.fromkeys(_place(each) for each in (*same, incident)))
    step, times = failure_step(state, incident), len(same) + 1
    if len(places) > 1:
        where = ", ".join(place for place in places if place) or "all nodes"
        return f"the program fails at step {step} on different nodes ({where}): {times} times in the same way"
    if incident.evidence.get("fault") == Fault.USER or incident.kind == FailureClass.GPU_ERROR:
        return f"the program fails at step {step}: {times} times with the same error"
    return None  # its ladder leaves the node out


def is_condemned(state: State, node: Node) -> bool:
    """Whether an excluded node may be drained, so that no other user of the cluster gets it.

    An operator may, and so may a detector that measured the node. A rank's log is not enough: NVML or the kernel log
    must agree.
    """
    incident = state.incidents.get(node.excluded_by or "")
    return incident is None or row(incident.kind).blames is not Blames.NOTHING or node.verdict is Verdict.BAD
