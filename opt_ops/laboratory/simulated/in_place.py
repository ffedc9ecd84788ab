"""How a simulated attempt goes on after it has lost ranks: survivors and new ranks form a newer generation.

The supervisor orders the generation. The ranks leave their collectives, meet in new groups, and go on from the newest
step of which every rank has the state or its buddy's copy. Or they do not come together, and wait to be ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opt_ops.contract.replacing import buddies
from opt_ops.laboratory.simulated.agents import NodeAgents
from opt_ops.laboratory.simulated.costs import Costs
from opt_ops.laboratory.simulated.timeline import Timeline
from opt_ops.laboratory.simulated.training import Training
from opt_ops.ports import Launch

_NO_COMMON_STEP = 88  # the trainer's exit code (docs/formats.md)


def keepers_of(nodes: Sequence[str]) -> dict[str, str]:
    """For each node the one whose memory holds its copies."""
    return {node: nodes[other] for node, other in zip(nodes, buddies(nodes), strict=True) if other is not None}


class Generations:
    """Forms the newer generations of running attempts."""

    def __init__(self, costs: Costs, timeline: Timeline, agents: NodeAgents) -> None:
        self._costs = costs
        self._timeline = timeline
        self._agents = agents
        self._newest: dict[str, int] = {}  # generation by attempt
        self._noticed_at: dict[str, float] = {}  # when the first survivor sees a death, by attempt
        self._cold: set[tuple[str, int]] = set()  # generations with a rank that started from nothing warm
        self.failing = 0
        """Number of the next generations that do not come together; see `faults.FailReplacements`."""
        self.training: Callable[[str], Training]
        self.went_on: Callable[[Training, Launch], None]

    def died(self, attempt: str, host_lost: bool) -> None:
        """A rank has died, and its peers notice. A lost host closes no connection: that takes longer."""
        if (in_place := self._costs.in_place) is not None:
            at = self._timeline.now + (in_place.peers if host_lost else 0.0)
            if attempt not in self._noticed_at:
                self._noticed_at[attempt] = at
                self._timeline.at(at, self._timeline.disturb)

    def peers_lost_since(self, attempt: str) -> float | None:
        """When survivors of the attempt saw broken connections, if they wait for a newer generation now."""
        at = self._noticed_at.get(attempt)
        return at if at is not None and self._timeline.now >= at else None

    def joining(self, launch: Launch, warm: bool) -> None:
        """An agent follows an order of a generation. `warm`: what it starts there was warm."""
        in_place, members, now = self._costs.in_place, launch.membership, self._timeline.now
        if in_place is None or members is None:
            return
        if members.generation > self._newest.get(launch.attempt, 1):
            self._newest[launch.attempt] = members.generation
            # Whoever has not noticed the death leaves its collective by the order.
            noticed = min(self._noticed_at.get(launch.attempt, now), now)
            wait = max(noticed + in_place.notice - now, 0.0) + in_place.join + in_place.state
            self._timeline.after(wait, self._meet, launch)
        if not warm:
            self._cold.add((launch.attempt, members.generation))

    def _meet(self, launch: Launch, cold: bool = False) -> None:
        members = launch.membership
        assert members is not None
        attempt = launch.attempt
        if members.generation != self._newest[attempt]:
            return  # another one was ordered since
        if (attempt, members.generation) in self._cold and not cold:
            self._timeline.after(self._costs.startup, self._meet, launch, True)
            return
        training = self.training(attempt)
        if not self._complete(launch) or (training.stuck_rank is not None and training.stuck_rank not in members.new):
            return
        if self.failing:
            self.failing -= 1
            return
        keepers, new = buddies([node for node, _ in members.ranks]), set(members.new)
        if any(keepers[rank] is None or keepers[rank] in new for rank in new):
            self._agents.finish(attempt, _NO_COMMON_STEP)
            return
        self._noticed_at.pop(attempt, None)
        self.went_on(training, launch)

    def _complete(self, launch: Launch) -> bool:
        parts = self._agents.parts[launch.attempt]
        there = (parts.get(node) for node in launch.nodes)
        return all(part is not None and part.alive == set(part.ranks) and not part.ending for part in there)
