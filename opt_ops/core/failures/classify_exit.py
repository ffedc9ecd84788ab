"""Why ranks ended: exit codes, signals and lines of logs → a failure class, the first rank, the node to blame.

Incidents and `opt-ops signals blame` both ask here. The lines are the programs' own words (untrusted). What names a
cause counts before what only tells that a peer was lost, in one log and between the logs of several ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core.failures.cause_lines import CauseLine, CauseLines, Found
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.failures.families import Family, Fault, Weight
from opt_ops.core.values import RankExit

CLASS_OF_CODE: Mapping[int, FailureClass] = {
    ExitCode.CHECKPOINT_REFUSED: FailureClass.CHECKPOINT_REFUSED,
    ExitCode.USER_ERROR: FailureClass.USER_ERROR,
    ExitCode.NOT_FINITE: FailureClass.NON_FINITE_LOSS,
    ExitCode.OUT_OF_MEMORY: FailureClass.OUT_OF_MEMORY,
    ExitCode.CORRUPT_DATA: FailureClass.SILENT_DATA_CORRUPTION,
    ExitCode.LOSS_SCALE_FLOOR: FailureClass.LOSS_SCALE_FLOOR,
    ExitCode.PEER_CORRUPT_DATA: FailureClass.COMMUNICATION,
    ExitCode.NO_COMMON_STEP: FailureClass.COMMUNICATION,
}
"""The trainer's exit codes that name a failure class of their own."""

_FAULT_OF_CODE: Mapping[int, Fault] = {
    ExitCode.CORRUPT_DATA: Fault.GPU,
    ExitCode.PEER_CORRUPT_DATA: Fault.PEER,
    ExitCode.NO_COMMON_STEP: Fault.PEER,
}

_KILLED, _STOPPED = 9, frozenset({1, 2, 15})  # SIGKILL; SIGHUP, SIGINT, SIGTERM: somebody asked it to stop
_CRASHED = frozenset({4, 7, 8, 9, 11})  # signals that a lost peer does not cause; SIGABRT follows a lost peer

_ENOUGH, _MOST = 256, 2048  # ranks that are looked at, by time: one failure ends up to 16 thousand


@dataclass(frozen=True, slots=True)
class Ending:
    """Why one rank ended, as far as its own exit and log tell.

    Attributes:
        kind: The failure class.
        fault: Whose fault it is.
        line: The line that says so; may be empty.
        order: Between ranks the lowest is the first cause.
        family: The family of the line; None if no line says why.
    """

    kind: FailureClass
    fault: Fault
    line: str
    order: int
    family: Family | None


@dataclass(frozen=True, slots=True)
class Blame:
    """Why an attempt ended.

    Attributes:
        first: The rank whose end was the first cause.
        kind: The failure class.
        fault: Whose fault it is.
        line: The line that says so; may be empty.
        node: The node to blame; None if none is, or if the logs do not tell.
        nodes: Where ranks ended in this way.
        ranks: How many ranks ended in this way.
        victim: Whether all ranks only report a lost peer, or that they were ordered to stop.
    """

    first: RankExit
    kind: FailureClass
    fault: Fault
    line: str
    node: str | None
    nodes: tuple[str, ...]
    ranks: int
    victim: bool


@lru_cache(maxsize=2 * _MOST)  # asked again at every tick until an incident is opened
def why_ended(ended: RankExit, said: str) -> Ending:
    """Why a rank ended by its exit and by lines of its log, in the log's order."""
    by_code = CLASS_OF_CODE.get(ended.code or 0)
    best = _best(CauseLines().add_all(said.splitlines()).found, ended)
    fault = best.family.fault if best else Fault.UNCLEAR
    line = best.line.text if best else ""
    if by_code is not None:
        order = _PEER if by_code is FailureClass.COMMUNICATION else _CAUSE
        return Ending(by_code, _FAULT_OF_CODE.get(ended.code or 0, Fault.USER), line, order, None)
    if best is None or best.family.weight is Weight.CRASH:
        crashed = _signal(ended) in _CRASHED
        return Ending(FailureClass.PROCESS_DEATH, fault, line, _CAUSE if crashed else _SILENT, None)
    return Ending(best.family.kind, fault, line, _order(best.family), best.family)


def _signal(ended: RankExit) -> int | None:
    """The signal that ended it; a shell between us and the program tells it as an exit code of 128 and more."""
    if ended.signal is not None:
        return ended.signal
    return ended.code - 128 if ended.code is not None and 128 < ended.code <= 192 else None


_CAUSE, _OWN, _SILENT, _PEER = range(4)


def _order(family: Family) -> int:
    if family.kind is FailureClass.COMMUNICATION or family.fault is Fault.SCHEDULER:
        return _PEER
    return _CAUSE if family.weight is Weight.CAUSE else _OWN


def _best(found: list[Found], ended: RankExit) -> Found | None:
    """The line that says most: by weight, then the first. Of a program's own exceptions the last ended it."""
    fresh = [each for each in found if not each.line.stale]
    if not fresh and (_signal(ended) == _KILLED or _signal(ended) in _STOPPED):
        return None  # training survived what the log says, and then it was killed
    if not (fresh := fresh or found):
        return None
    best = min(fresh, key=lambda each: each.family.weight)  # the first of them
    if best.family.name != "exception":
        return best
    return next(each for each in reversed(fresh) if each.family is best.family)


def blame(failed: Mapping[RankExit, str]) -> Blame:
    """Why an attempt ended. `failed`: every rank that ended badly, with lines of its log; at least one."""
    endings: dict[RankExit, Ending] = {}
    for ended in sorted(failed, key=lambda each: (each.at, each.rank))[:_MOST]:
        endings[ended] = why_ended(ended, failed[ended])
        if len(endings) >= _ENOUGH and any(ending.order < _PEER for ending in endings.values()):
            break
    _explain_kills(endings)
    first = min(endings, key=lambda ended: (endings[ended].order, ended.at, ended.rank))
    cause = endings[first]
    alike = [ended for ended, other in endings.items() if _alike(other, cause)]
    nodes = tuple(sorted({ended.node for ended in alike}))
    return Blame(
        first=first,
        kind=cause.kind,
        fault=cause.fault,
        line=cause.line,
        node=first.node if len(nodes) == 1 and _is_of_node(cause, len(alike), endings) else None,
        nodes=nodes,
        ranks=len(alike),
        victim=cause.order == _PEER,
    )


def _explain_kills(endings: dict[RankExit, Ending]) -> None:
    """A notice of the kernel's or Slurm's memory killer stands in any log of the node: it explains the killed rank."""
    killed = [ended for ended, ending in endings.items() if _signal(ended) == _KILLED and ending.family is None]
    for ended in killed:
        for other, ending in endings.items():
            if other.node == ended.node and ending.family is not None and ending.family.name == "host_memory":
                endings[ended] = ending


def _alike(other: Ending, cause: Ending) -> bool:
    if cause.family is None or other.family is None:
        return other.kind is cause.kind and other.family is cause.family and other.order == cause.order
    return other.kind is cause.kind and _order(other.family) == _order(cause.family)


def _is_of_node(cause: Ending, ranks: int, endings: Mapping[RankExit, Ending]) -> bool:
    """Whether the node is to blame, if ranks ended in this way on one node only."""
    if cause.fault in (Fault.GPU, Fault.NODE):
        return True
    if cause.kind is not FailureClass.STORAGE or len({ended.node for ended in endings}) == 1:
        return False
    return cause.fault is Fault.CLIENT or (ranks > 1 and "put/output" in cause.line)


def last_words(ended: RankExit, lines: Iterable[CauseLine]) -> str:
    """Lines that were kept while a log was written, as text for `blame`.

    What training survived counts only if the rank left by itself and says nothing else.
    """
    kept = list(lines)
    fresh = [line.text for line in kept if not line.stale]
    if fresh or _signal(ended) == _KILLED or _signal(ended) in _STOPPED:
        return "\n".join(fresh)
    return "\n".join(line.text for line in kept)
