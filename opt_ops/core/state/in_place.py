"""A replacement of ranks in place, or why there was none, in sentences: for alerts, commands and the logbook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from opt_ops.contract.replacing import CAPABILITY
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.model import Incident, State
from opt_ops.core.text import count, duration, number_spans
from opt_ops.core.values import Action

_DIED = frozenset({FailureClass.PROCESS_DEATH, FailureClass.GPU_ERROR, FailureClass.COMMUNICATION})
_OF_A_NODE: Mapping[str, tuple[str, str]] = {
    FailureClass.SILENT_NODE: ("went silent", "went silent"),
    FailureClass.HANG: ("hung", "hung"),
    FailureClass.STRAGGLER: ("was slow", "were slow"),
    FailureClass.BAD_GPU: ("had a bad GPU", "had a bad GPU"),
}
_NAMED = 4  # nodes or moves that are named; more are counted


def joined(state: State, incident: Incident) -> Members | None:
    """The replacement of ranks by which the incident was recovered in place; None if there was none."""
    ordered = replacements(state, incident)
    return next((each for each in ordered if each.joined_at is not None), None)


def replacements(state: State, incident: Incident) -> list[Members]:
    """All replacements of ranks that were ordered for an incident, oldest first."""
    attempt = state.attempts.get(incident.attempt or "")
    return [each for each in attempt.members if each.incident == incident.name] if attempt else []


def is_in_place(state: State, incident: Incident) -> bool | None:
    """Whether ranks were replaced in place; False: all ranks were started again. None: neither, or not known yet."""
    if joined(state, incident) is not None:
        return True
    decision = incident.decision
    if incident.fell_back is not None:
        return False
    again = decision is not None and decision.action in (Action.RESTART, Action.ROLLBACK, Action.RECONFIGURE)
    return False if again and incident.acted_on else None


def in_sentences(state: State, incident: Incident) -> str:
    """What became of the ranks that an incident has cost; empty if nothing in place was tried and done."""
    attempt = state.attempts.get(incident.attempt or "")
    if attempt is None:
        return ""
    found = joined(state, incident)
    if found is not None:
        return " ".join(_recovered(attempt, incident, found, replacements(state, incident)[0]))
    why = incident.fell_back or (incident.decision.not_in_place if incident.decision else None)
    return " ".join(_fell_back(state, attempt, incident, why)) if why else ""


def standby(ready: int) -> str:
    """`standby 8 ready`: warm ranks that wait on a node, or on all of them."""
    return f"standby {ready} ready" if ready else "no standby ready"


def standbys(state: State) -> int | None:
    """Warm ranks that wait for a place on held nodes; None if no ranks of the newest attempt can be replaced."""
    attempt = state.attempt
    if state.ended or attempt is None or CAPABILITY not in attempt.capabilities:
        return None
    return sum(state.nodes[name].standby for name in state.held if name in state.nodes)


def moves(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """(old, new) of each node that another one has taken the place of."""
    return [(old, new) for old, new in zip(before, after, strict=False) if old != new]


def _recovered(attempt: Attempt, incident: Incident, last: Members, first: Members) -> Iterator[str]:
    lost = lost_ranks(attempt, incident, first)
    yield f"{_subject(attempt, incident, lost, first.before)} {_verb(incident, lost, first)}{_at(last.step)}."
    yield from _others(attempt, last)
    yield _who_took_over(lost, last, first, attempt)
    if last.repeated:
        yield f"{count(last.repeated, 'step')} {'was' if last.repeated == 1 else 'were'} made again."
    if last.step is not None:
        after = f" after {duration(incident.seconds_down)}" if incident.seconds_down is not None else ""
        yield f"Training went on with step {last.step + 1:,}{after}."


def _at(step: int | None) -> str:
    return f" at step {step:,}" if step is not None else ""


def _others(attempt: Attempt, found: Members) -> Iterator[str]:
    others = attempt.ranks - len(found.new)
    if not others:
        return
    if found.kept is None:
        yield f"The other {'rank' if others == 1 else count(others, 'rank')} kept running."
    elif found.kept == others:
        yield f"The other {'process' if others == 1 else count(others, 'process', 'processes')} stayed."
    else:
        yield f"{found.kept} of the other {count(others, 'process', 'processes')} stayed."


def _who_took_over(lost: Sequence[int], found: Members, first: Members, attempt: Attempt) -> str:
    moved = moves(first.before, found.nodes)
    its = "its place" if len(found.new) == 1 else "their places"
    if not moved:
        where = attempt.nodes_of(found.new)
        who = "A warm process" if len(found.new) == 1 else "Warm processes"
        return f"{who} on {_listed(where)} took {its}."
    if len(moved) == 1 and set(lost) == set(found.new):
        return f"{moved[0][1]} took {its}."
    if len(moved) > _NAMED:
        return f"{len(moved)} other nodes took the places of theirs, with {ranks(found.new)}."
    took = " and ".join(f"{new} took the place of {old}" for old, new in moved)
    return f"{took}, with {ranks(found.new)}."


def _fell_back(state: State, attempt: Attempt, incident: Incident, why: str) -> Iterator[str]:
    ordered = replacements(state, incident)
    first = ordered[0] if ordered else None
    lost = lost_ranks(attempt, incident, first)
    before = first.before if first else attempt.nodes
    yield f"{_subject(attempt, incident, lost, before)} {_be(lost, 'was', 'were')} not replaced in place: {why}."
    following = state.attempts.get(incident.next_attempt or "")
    if following is not None:
        point = following.checkpoint
        yield f"All ranks were restarted from {f'step {point.step:,}' if point else 'the start'}."


def lost_ranks(attempt: Attempt, incident: Incident, first: Members | None) -> tuple[int, ...]:
    """The ranks that an incident has cost: those that the evidence names, else those on its nodes.

    Args:
        attempt: The attempt that it hit.
        incident: The loss.
        first: The first replacement that was ordered for it.
    """
    if incident.kind in _DIED and incident.lost_ranks:
        return tuple(sorted(incident.lost_ranks))
    if first is not None:
        return first.new
    return attempt.ranks_on(incident.nodes)


def _subject(attempt: Attempt, incident: Incident, lost: Sequence[int], nodes: Sequence[str]) -> str:
    """`Rank 17 on n3`; or the nodes, where it is they that failed."""
    if incident.kind not in _DIED and incident.nodes:
        return _listed(incident.nodes)
    each = attempt.ranks_per_node or 1
    there = dict.fromkeys(nodes[rank // each] for rank in lost if rank // each < len(nodes))
    where = f" on {_listed(list(there))}" if there else ""
    text = ranks(lost) if lost else "the lost ranks"
    return f"{text[:1].upper()}{text[1:]}{where}"


def _verb(incident: Incident, lost: Sequence[int], first: Members) -> str:
    if incident.kind in _DIED:
        return "died"
    one = len(incident.nodes) == 1
    known = _OF_A_NODE.get(incident.kind, ("was lost", "were lost"))
    return known[0] if one else known[1]


def ranks(numbers: Sequence[int]) -> str:
    """`rank 17`, `ranks 16–23`."""
    return f"rank{'' if len(numbers) == 1 else 's'} {number_spans(numbers)}"


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    if len(known) > _NAMED:
        return f"{len(known)} nodes"
    return " and ".join(filter(None, (", ".join(known[:-1]), known[-1]))) if known else "no node"


def _be(numbers: Sequence[int], one: str, many: str) -> str:
    return one if len(numbers) == 1 else many
