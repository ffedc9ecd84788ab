"""Operators' requests: valid ones become events, the others are refused with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opt_ops.core.events import (
    DrillRequested,
    Event,
    LineageStarted,
    NoteAdded,
    RequestRefused,
    StopRequested,
)
from opt_ops.core.run import Attempt, State
from opt_ops.core.values import Fault, Shape
from opt_ops.ports import Inbox, Request


class _No(ValueError):
    """Why a request cannot be carried out."""


class RequestWatch:
    """Reads the inbox."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def observe(self, state: State) -> Iterator[Event]:
        """One event for each request; a request that was journaled before a crash is only taken out."""
        for request in self._inbox.requests():
            if request.request not in state.requests:
                yield event_of(state, request)
            self._inbox.done(request.request)


def event_of(state: State, request: Request) -> Event:
    """What the request means on this state: the event to journal, a `RequestRefused` among them."""
    try:
        return _VERBS[request.verb](state, request)
    except KeyError as error:
        why = f"unknown verb or missing argument {error}"
    except (_No, TypeError, ValueError) as error:
        why = str(error)
    return RequestRefused(request=request.request, author=request.author, verb=request.verb, why=why)


def _start(state: State, request: Request) -> Event:
    if state.lineage is not None:
        raise _No("the lineage was started already")
    arguments = request.arguments
    return LineageStarted(
        request=request.request,
        author=request.author,
        lineage=str(arguments["lineage"]),
        recipe=str(arguments["recipe"]),
        settings=tuple(map(str, arguments["settings"])),
        data=tuple(map(str, arguments["data"])),
        tokenizer=arguments["tokenizer"],
        shape=Shape(**arguments["shape"]),
    )


def _stop(state: State, request: Request) -> Event:
    if state.lineage is None or state.ended:
        raise _No(f"the lineage is {state.status}")
    return StopRequested(request=request.request, author=request.author, reason=str(request.arguments["reason"]))


def _note(state: State, request: Request) -> Event:
    arguments = request.arguments
    return NoteAdded(
        request=request.request,
        author=request.author,
        target=str(arguments["target"]),
        text=str(arguments["text"]),
    )


def _drill(state: State, request: Request) -> Event:
    fault = Fault(request.arguments["fault"])
    attempt = state.attempt if state.attempt and state.attempt.live else None
    if state.ended or (attempt is None and fault is not Fault.KILL_DAEMON):
        raise _No(f"no attempt runs; the lineage is {state.status}")
    return DrillRequested(
        request=request.request,
        author=request.author,
        drill=f"d{len(state.drills):03d}",
        fault=fault,
        attempt=attempt.name if attempt else None,
        arguments=_drill_arguments(state, attempt, fault, request.arguments),
    )


def _drill_arguments(
    state: State, attempt: Attempt | None, fault: Fault, given: Mapping[str, Any]
) -> Mapping[str, Any]:
    match fault:
        case Fault.KILL_RANK:
            assert attempt is not None
            rank, ranks = int(given["rank"]), len(attempt.nodes) * attempt.ranks_per_node
            if not 0 <= rank < ranks:
                raise _No(f"rank {rank}: {attempt.name} has ranks 0 to {ranks - 1}")
            return {"rank": rank}
        case Fault.XID:
            node, held = str(given["node"]), state.allocation.nodes if state.allocation else ()
            if node not in held:
                raise _No(f"node {node} is not held; held are {', '.join(held)}")
            return {"node": node, "xid": int(given["xid"])}
        case Fault.LR:
            assert attempt is not None
            if attempt.last_step is None:
                raise _No(f"{attempt.name} has made no step yet")
            from_step = attempt.last_step + 1
            return {
                "from_step": max(from_step, int(given["from_step"] or 0)),
                "updates": int(given["updates"]),
                "factor": float(given["factor"]),
            }
        case Fault.KILL_DAEMON:
            return {}


_VERBS = {"start": _start, "stop": _stop, "note": _note, "drill": _drill}
