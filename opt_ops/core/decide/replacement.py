"""Whether the lost ranks of a running attempt can be replaced while the others keep running, and by whom.

A dead process is replaced on its own node by a warm process there. A node is replaced as a whole by a spare node, which
takes its index: so the place of every rank stays a formula. The state of a new rank comes from its buddy, which keeps a
copy on another node. So whoever is replaced needs a buddy that stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from opt_ops.contract.replacing import CAPABILITY, buddies
from opt_ops.core.decide.capacity import acts, eligible_nodes, nears_limit
from opt_ops.core.decide.policy import Policy
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.in_place import moves
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.queries import waiting_for_attempt

MOST_NODES = 2
"""Nodes that are replaced at once, at most. Where more fail together, the network or the power has failed."""

_NODE_GOES = frozenset({FailureClass.BAD_GPU, FailureClass.SILENT_NODE, FailureClass.HANG, FailureClass.STRAGGLER})
"""The whole node is replaced, even if its processes live."""
_ALLOCATION_GOES = frozenset({FailureClass.PREEMPTION, FailureClass.ALLOCATION_LOST})
_RANKS_GO = frozenset({FailureClass.PROCESS_DEATH, FailureClass.GPU_ERROR})

REPLACEABLE: frozenset[str] = _NODE_GOES | _ALLOCATION_GOES | _RANKS_GO
"""Failure classes that leave the state of the other ranks sound. With all others the state itself is what is wrong, or
the failure would come again."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """Who takes whose place.

    Attributes:
        nodes: Of the attempt afterwards, by index.
        ranks: The ranks that are replaced.
    """

    nodes: tuple[str, ...]
    ranks: tuple[int, ...]


def is_capable(attempt: Attempt) -> bool:
    """Whether the trainer of the attempt can go on with some of its ranks replaced."""
    return CAPABILITY in attempt.capabilities and bool(attempt.nodes) and attempt.ranks_per_node > 0


def keepers_of(attempt: Attempt) -> list[int | None]:
    """For each rank the one that keeps a copy of its state; None if nobody does."""
    return buddies([name for name in attempt.nodes for _ in range(attempt.ranks_per_node)])


def is_question(state: State, incident: Incident, policy: Policy) -> bool:
    """Whether a replacement in place is to be thought of at all."""
    attempt = state.attempt
    return (
        policy.in_place
        and attempt is not None
        and attempt.live
        and incident.attempt == attempt.name
        and incident.kind in REPLACEABLE
        and is_capable(attempt)
    )


def replace_lost(
    state: State, incident: Incident, exclude: Iterable[str], now: float, policy: Policy
) -> Replacement | str:
    """The replacement of the ranks that an incident has cost; or, in words, why there is none.

    Args:
        state: The lineage; `is_question` holds for it.
        incident: The loss.
        exclude: The nodes that are excluded because of it.
        now: Seconds since the epoch.
        policy: The settings of the site.
    """
    attempt = state.attempt
    assert attempt is not None
    if incident.fell_back is not None:
        return f"ranks were not replaced: {incident.fell_back}"
    if (why := _not_now(state, attempt, incident)) is not None:
        return why
    lost, leaving = _lost(state, attempt, incident, now, policy)
    if incident.kind == FailureClass.HANG and not leaving:
        return "the stacks name no node that hangs alone"
    return place(state, attempt, lost, {*leaving, *exclude}, now, policy)


def place(
    state: State,
    attempt: Attempt,
    lost: Iterable[int],
    leaving: Iterable[str],
    now: float,
    policy: Policy,
    unjoined: Iterable[int] = (),
) -> Replacement | str:
    """Places for new ranks: on their node if it is fit and warm ranks wait there, else on a spare that takes its index.

    Args:
        state: The lineage.
        attempt: It runs.
        lost: Ranks whose process, or whose state, is gone.
        leaving: Nodes that take part no longer, whatever runs there.
        now: Seconds since the epoch.
        policy: The settings of the site.
        unjoined: Ranks that were ordered to start in the generation before and have no state yet. They start again
            where they are, from the warm process of their node.
    """
    lost, gone = set(lost), {*leaving, *_unusable(state, attempt)}
    fit = eligible_nodes(state, policy, now)
    spares = [
        name
        for name in fit
        if name not in attempt.nodes and name not in gone and state.nodes[name].standby >= attempt.ranks_per_node
    ]
    nodes, new, moved = list(attempt.nodes), {*lost, *unjoined}, 0
    for index, name in enumerate(attempt.nodes):
        here = attempt.ranks_on([name])
        dead = lost.intersection(here)
        if name not in gone and (not dead or (name in fit and state.nodes[name].standby >= len(dead))):
            continue
        moved += 1
        if moved > MOST_NODES:
            return f"more than {MOST_NODES} nodes are hit"
        if not spares:
            return f"no spare node is fit with {attempt.ranks_per_node} warm ranks to take the place of {name}"
        nodes[index] = spares.pop(0)
        new.update(here)
    if not new:
        return "the incident names no rank"
    if (why := _pair(attempt, new)) is not None:
        return why
    return Replacement(tuple(nodes), tuple(sorted(new)))


def described(state: State, found: Replacement) -> str:
    """What is done, in words."""
    before = state.attempt.nodes if state.attempt is not None else ()
    if moved := moves(before, found.nodes):
        return ", ".join(f"{new} takes the place of {old}" for old, new in moved)
    one = len(found.ranks) == 1
    return f"rank{'' if one else 's'} {', '.join(map(str, found.ranks))} start{'s' if one else ''} again where it was"


def _not_now(state: State, attempt: Attempt, incident: Incident) -> str | None:
    """Why nothing can be replaced at this moment, whatever was lost."""
    if not acts(state):
        return "the daemon does not drive" if state.paused is None else "training is being paused"
    if attempt.stop_why is not None or attempt.leave_at is not None:
        return f"the attempt is ending: {attempt.stop_why or attempt.leave_why}"
    if attempt.first_step is None:
        return "the attempt has made no step yet"
    if attempt.steps is not None and (attempt.last_step or 0) >= attempt.steps:
        return "every step is made"
    others = (each for each in waiting_for_attempt(state) if each.next_attempt != attempt.name)
    if (other := next(others, None)) is not None:
        return f"the attempt is ending: {other.cause}"
    if attempt.rejoining is not None:
        return f"ranks are being replaced for {attempt.rejoining.incident}"
    return None


def _lost(state: State, attempt: Attempt, incident: Incident, now: float, policy: Policy) -> tuple[set[int], set[str]]:
    """The ranks that are lost, and the nodes that leave."""
    if incident.kind in _RANKS_GO:
        return set(incident.lost_ranks), set()
    if incident.kind in _NODE_GOES:
        return set(), set(incident.nodes).intersection(attempt.nodes)
    holders = {name: state.held[name] for name in attempt.nodes if name in state.held}
    return set(), {name for name in attempt.nodes if name not in holders or nears_limit(holders[name], now, policy)}


def _unusable(state: State, attempt: Attempt) -> set[str]:
    """Nodes of the attempt on which nothing may run any more."""
    known = {name: state.nodes.get(name) for name in attempt.nodes}
    return {name for name, node in known.items() if name not in state.held or node is None or node.excluded_by}


def _pair(attempt: Attempt, new: set[int]) -> str | None:
    """Why the state of a new rank is nowhere: its buddy is replaced as well, or it has none."""
    keepers = keepers_of(attempt)
    for rank in sorted(new):
        keeper = keepers[rank] if rank < len(keepers) else None
        if keeper is None:
            return f"nobody keeps a copy of rank {rank}"
        if keeper in new:
            return f"rank {rank} is lost, and so is rank {keeper}, which keeps its copy"
    return None
