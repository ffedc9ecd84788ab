"""An oracle that meets the same faults: the same physical costs, no delay, no mistake, no wait for an operator.

It knows at once what happened, which hosts are good, which learning rate cures, and that a spike will recover. It saves
at the best interval. It pays physical costs only: the end and the start of processes, loads, saves, the steps since the
last committed checkpoint, the steps back to weights that still recover, and the wait for hosts.

With recovery in place it replaces hosts and ranks while the others keep running, whenever a spare is there and not both
of a pair are lost. It pays for the part of the step in flight, the notice, the new groups and the copy of the state.
Its standbys are always warm, its replacements never fail, and it saves only for what still needs a restart.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from opt_ops.laboratory.replay.fault_plan import FaultPlan, Stop
from opt_ops.laboratory.replay.scenario import Scenario


@dataclass(slots=True)
class _Position:
    """How far the oracle has come."""

    now: float = 0.0
    step: int = 0
    hosts: int = 0  # good ones that are present
    nodes: int = 0  # of them, in use


class Oracle:
    """Trains a scenario. `seconds` is the wall-clock time of the whole training."""

    def __init__(self, scenario: Scenario, fault_plan: FaultPlan) -> None:
        self._scenario = scenario
        self._fault_plan = fault_plan
        cluster, training, physical = scenario.cluster, scenario.training, scenario.physical
        self._full = cluster.nodes
        self._least = cluster.min_nodes or cluster.nodes
        self._step_seconds = training.step_seconds.value
        self._restart = physical.obey.value + physical.rank_end.value + physical.startup.value + physical.load.value
        self._in_place = scenario.in_place
        restarts = [stop for stop in fault_plan.stops if self._in_place is None or stop.pair]
        stops = len(restarts) + len(fault_plan.divergences) + (fault_plan.loss is not None)
        between = scenario.healthy_seconds / max(stops, 1)
        self._save = physical.save.value
        self._interval = max(math.sqrt(2 * self._save * between), self._step_seconds) if stops else math.inf
        self._position = _Position(hosts=cluster.nodes + cluster.spares)
        self._coming: list[tuple[float, int]] = []  # (when, how many hosts): a heap
        self.seconds = self._run()

    def _run(self) -> float:
        position, physical = self._position, self._scenario.physical
        position.now = physical.queue.value + physical.agent_start.value + physical.startup.value + physical.obey.value
        position.nodes = min(position.hosts, self._full)
        for step, what in self._events():
            self._train_to(step)
            if isinstance(what, Stop):
                self._stop(what)
            elif what == "diverged":
                self._restarted(position.now + self._scenario.divergences.rooted_steps.value * self._pace())
            elif what == "slow":
                position.hosts -= 1
                if self._in_place is not None and position.hosts >= position.nodes:
                    position.now += self._in_place.join.value + self._in_place.state.value  # nothing is broken
                else:
                    self._restarted(position.now + self._save)
            else:
                self._lose_all()
        self._train_to(self._scenario.training.steps)
        return position.now + physical.commit.value

    def _events(self) -> list[tuple[int, Stop | str]]:
        fault_plan = self._fault_plan
        found: list[tuple[int, Stop | str]] = [(stop.step, stop) for stop in fault_plan.stops]
        found += [(divergence.step, "diverged") for divergence in fault_plan.divergences]
        found += [(step, "slow") for step in fault_plan.slow]
        if fault_plan.loss is not None:
            found.append((fault_plan.loss.step, "lost"))
        return sorted(found, key=lambda pair: pair[0])

    def _pace(self) -> float:
        return self._step_seconds * self._full / self._position.nodes

    def _train_to(self, step: int) -> None:
        """Train to a step, and grow when new hosts are worth the restart."""
        position, training = self._position, self._scenario.training
        step = max(step, position.step)
        while position.step < step:
            per_step = self._pace() + self._save * self._pace() / self._interval
            per_step += self._scenario.healthy_seconds / training.steps - self._step_seconds  # evaluation's share
            per_step += self._in_place.copy_.value if self._in_place else 0.0
            arrives = self._coming[0][0] if self._coming else math.inf
            possible = step - position.step
            if arrives < position.now + possible * per_step:
                possible = max(0, int((arrives - position.now) / per_step))
                position.step, position.now = position.step + possible, max(position.now + possible * per_step, arrives)
                position.hosts += heapq.heappop(self._coming)[1]
                self._grow(step)
            else:
                position.step, position.now = step, position.now + possible * per_step

    def _grow(self, until: int) -> None:
        position = self._position
        more = min(position.hosts, self._full)
        if more <= position.nodes:
            return
        gain = (until - position.step) * self._step_seconds * (self._full / position.nodes - self._full / more)
        if gain > self._restart + self._save:
            self._restarted(position.now + self._save)

    def _stop(self, stop: Stop) -> None:
        position, physical = self._position, self._scenario.physical
        if stop.kind == "planned":
            self._restarted(position.now + self._save)
            return
        position.hosts -= len(stop.replacements)
        for replacements in stop.replacements:
            heapq.heappush(self._coming, (position.now + replacements[-1].after, 1))
        if self._in_place is not None and not stop.pair and position.hosts >= position.nodes:
            position.now += stop.in_flight * self._pace() + self._in_place.stop
            return
        repeated = min(self._interval / 2 + physical.commit.value, position.step * self._step_seconds)
        failed = stop.launch_fails * (self._restart + physical.abort.value)
        self._restarted(position.now + repeated + failed)

    def _restarted(self, at: float) -> None:
        """Continue after a restart on all present hosts; wait first until there are enough."""
        position = self._position
        position.now = at + self._restart
        while self._coming and (self._coming[0][0] <= position.now or position.hosts < self._least):
            when, count = heapq.heappop(self._coming)
            position.hosts += count
            position.now = max(position.now, when)
        position.nodes = max(1, min(position.hosts, self._full))

    def _lose_all(self) -> None:
        position, loss = self._position, self._fault_plan.loss
        assert loss is not None
        position.hosts, there = 0, 0
        for seconds, count in loss.back:
            heapq.heappush(self._coming, (position.now + seconds, count - there))
            there = count
        physical = self._scenario.physical
        repeated = self._interval / 2 + physical.commit.value
        while position.hosts < self._least:
            when, count = heapq.heappop(self._coming)
            position.now, position.hosts = max(position.now, when), position.hosts + count
        self._restarted(position.now + physical.queue.value + physical.agent_start.value + repeated)
