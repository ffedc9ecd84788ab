"""What a requested drill hits: its arguments as typed values, within what the attempt has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opt_ops.contract.drills import IN_STEP
from opt_ops.core.decide.replacement import is_capable, keepers_of
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import State
from opt_ops.core.values import Fault
from opt_ops.supervise.request_arguments import MOST_RANKS_IN_ALL, MOST_STEPS, Arguments, InvalidRequest

LONGEST_WAIT = 86400.0  # seconds


def drill_arguments(state: State, attempt: Attempt | None, fault: Fault, given: Arguments) -> Mapping[str, Any]:
    """The arguments of a drill.

    Args:
        state: of the lineage.
        attempt: the running one. Only a drill on the daemon needs none.
        fault: what is injected.
        given: by the request.

    Raises:
        InvalidRequest: the drill cannot be carried out.
    """
    if fault is Fault.KILL_DAEMON:
        return {}
    assert attempt is not None
    match fault:
        case Fault.KILL_RANK:
            return {"rank": _rank(attempt, given), **_place(attempt, given)}
        case Fault.HANG:
            return {"rank": _rank(attempt, given)}
        case Fault.FLIP_BIT:
            return {"rank": _rank(attempt, given), "from_step": attempt.last_step or 1}
        case Fault.KILL_NODE:
            return _node(attempt, given.text("node"))
        case Fault.KILL_PAIR:
            return {"ranks": _pair(attempt, _rank(attempt, given))}
        case Fault.SLOW_STANDBY:
            _require_members(attempt)
            seconds = given.positive("seconds")
            if seconds > LONGEST_WAIT:
                raise InvalidRequest(f"seconds is {seconds:g}; it must be at most {LONGEST_WAIT:g}")
            return {"seconds": seconds}
        case Fault.XID:
            node, held = given.text("node"), state.held
            if node not in held:
                raise InvalidRequest(f"node {node} is not held; held nodes: {', '.join(held) or 'none'}")
            return {"node": node, "xid": given.whole("xid", 0, 10**6)}
        case _:
            return _of_steps(attempt, fault, given)


def _of_steps(attempt: Attempt, fault: Fault, given: Arguments) -> Mapping[str, Any]:
    """Of a fault in the learning rate or the loss of some steps."""
    if attempt.last_step is None:
        raise InvalidRequest(f"attempt {attempt.name} has made no step yet")
    from_step = max(attempt.last_step + 1, given.whole("from_step", 0, MOST_STEPS, 0))
    if fault is Fault.NAN:
        return {"from_step": from_step}
    return {
        "from_step": from_step,
        "updates": given.whole("updates", 1, MOST_STEPS),
        "factor": given.positive("factor"),
    }


def _rank(attempt: Attempt, given: Arguments) -> int:
    last = attempt.ranks - 1
    rank = given.whole("rank", -MOST_RANKS_IN_ALL, MOST_RANKS_IN_ALL, min(1, last))
    if not 0 <= rank <= last:
        raise InvalidRequest(f"rank {rank}: {attempt.name} has ranks 0 to {last}")
    return rank


def _place(attempt: Attempt, given: Arguments) -> Mapping[str, str]:
    """Where in an update the rank kills itself; nothing if an agent kills it at any moment."""
    place = given.text("in_step", default="")
    if not place:
        return {}
    if place not in IN_STEP:
        raise InvalidRequest(f"in_step is {place!r}, none of {', '.join(IN_STEP)}")
    _require_members(attempt)
    return {"in_step": place}


def _require_members(attempt: Attempt) -> None:
    if not is_capable(attempt):
        raise InvalidRequest(f"the ranks of {attempt.name} cannot be replaced in place: its trainer has no such drill")


def _node(attempt: Attempt, node: str) -> Mapping[str, Any]:
    if node not in attempt.nodes:
        raise InvalidRequest(f"no rank of {attempt.name} runs on {node}; its nodes: {', '.join(attempt.nodes)}")
    return {"node": node, "ranks": list(attempt.ranks_on([node]))}


def _pair(attempt: Attempt, rank: int) -> Sequence[int]:
    """A rank and the one that keeps its copy."""
    keeper = keepers_of(attempt)[rank]
    if keeper is None:
        raise InvalidRequest(f"{attempt.name} has one rank: nobody keeps a copy of it")
    return [rank, keeper]
