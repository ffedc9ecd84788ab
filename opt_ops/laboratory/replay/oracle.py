"""An oracle on the same fate: the same physical costs, no delay, no mistake, nobody to wait for.

It knows at once what has happened, which hosts are good, which learning rate cures and that a spike will heal. It
saves as often as is best. What it pays is physical: ends and starts of processes, loading, saving, the steps since the
last committed checkpoint, the steps back to weights that are not lost yet, and the time until hosts exist.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from opt_ops.laboratory.replay.fault_plan import Fate, Stop
from opt_ops.laboratory.replay.scenario import Scenario


@dataclass(slots=True)
class _Course:
    """Where the oracle stands."""

    now: float = 0.0
    step: int = 0
    hosts: int = 0  # good ones that are there
    nodes: int = 0  # that it trains on


class Oracle:
    """`seconds` is the wall clock of the whole training."""

    def __init__(self, scenario: Scenario, fate: Fate) -> None:
        self._scenario = scenario
        self._fate = fate
        cluster, training, physical = scenario.cluster, scenario.training, scenario.physical
        self._full = cluster.nodes
        self._least = cluster.min_nodes or cluster.nodes
        self._step_seconds = training.step_seconds.value
        self._restart = physical.obey.value + physical.rank_end.value + physical.startup.value + physical.load.value
        stops = len(fate.stops) + len(fate.sicknesses) + (fate.loss is not None)
        between = scenario.healthy_seconds / max(stops, 1)
        self._save = physical.save.value
        self._interval = max(math.sqrt(2 * self._save * between), self._step_seconds) if stops else math.inf
        self._course = _Course(hosts=cluster.nodes + cluster.spares)
        self._coming: list[tuple[float, int]] = []  # (when, how many hosts): a heap
        self.seconds = self._run()

    def _run(self) -> float:
        course, physical = self._course, self._scenario.physical
        course.now = physical.queue.value + physical.agent_start.value + physical.startup.value + physical.obey.value
        course.nodes = min(course.hosts, self._full)
        for step, what in self._events():
            self._train_to(step)
            if isinstance(what, Stop):
                self._stop(what)
            elif what == "diverged":
                self._restarted(course.now + self._scenario.divergences.rooted_steps.value * self._pace())
            elif what == "slow":
                course.hosts -= 1
                self._restarted(course.now + self._save)
            else:
                self._lose_all()
        self._train_to(self._scenario.training.steps)
        return course.now + physical.commit.value

    def _events(self) -> list[tuple[int, Stop | str]]:
        fate = self._fate
        found: list[tuple[int, Stop | str]] = [(stop.step, stop) for stop in fate.stops]
        found += [(sickness.step, "diverged") for sickness in fate.sicknesses]
        found += [(step, "slow") for step in fate.slow]
        if fate.loss is not None:
            found.append((fate.loss.step, "lost"))
        return sorted(found, key=lambda pair: pair[0])

    def _pace(self) -> float:
        return self._step_seconds * self._full / self._course.nodes

    def _train_to(self, step: int) -> None:
        """Train, and grow when hosts arrive that pay for the restart."""
        course, training = self._course, self._scenario.training
        step = max(step, course.step)
        while course.step < step:
            per_step = self._pace() + self._save * self._pace() / self._interval
            per_step += self._scenario.healthy_seconds / training.steps - self._step_seconds  # evaluation's share
            arrives = self._coming[0][0] if self._coming else math.inf
            possible = step - course.step
            if arrives < course.now + possible * per_step:
                possible = max(0, int((arrives - course.now) / per_step))
                course.step, course.now = course.step + possible, max(course.now + possible * per_step, arrives)
                course.hosts += heapq.heappop(self._coming)[1]
                self._grow(step)
            else:
                course.step, course.now = step, course.now + possible * per_step

    def _grow(self, until: int) -> None:
        course = self._course
        more = min(course.hosts, self._full)
        if more <= course.nodes:
            return
        gain = (until - course.step) * self._step_seconds * (self._full / course.nodes - self._full / more)
        if gain > self._restart + self._save:
            self._restarted(course.now + self._save)

    def _stop(self, stop: Stop) -> None:
        course, physical = self._course, self._scenario.physical
        if stop.kind == "planned":
            self._restarted(course.now + self._save)
            return
        course.hosts -= len(stop.arrivals)
        for arrivals in stop.arrivals:
            heapq.heappush(self._coming, (course.now + arrivals[-1].after, 1))
        repeated = min(self._interval / 2 + physical.commit.value, course.step * self._step_seconds)
        failed = stop.launch_fails * (self._restart + physical.abort.value)
        self._restarted(course.now + repeated + failed)

    def _restarted(self, at: float) -> None:
        """Training goes on after a restart, on as many hosts as there are; it waits until they are enough."""
        course = self._course
        course.now = at + self._restart
        while self._coming and (self._coming[0][0] <= course.now or course.hosts < self._least):
            when, count = heapq.heappop(self._coming)
            course.hosts += count
            course.now = max(course.now, when)
        course.nodes = max(1, min(course.hosts, self._full))

    def _lose_all(self) -> None:
        course, loss = self._course, self._fate.loss
        assert loss is not None
        course.hosts, there = 0, 0
        for seconds, count in loss.back:
            heapq.heappush(self._coming, (course.now + seconds, count - there))
            there = count
        physical = self._scenario.physical
        repeated = self._interval / 2 + physical.commit.value
        while course.hosts < self._least:
            when, count = heapq.heappop(self._coming)
            course.now, course.hosts = max(course.now, when), course.hosts + count
        self._restarted(course.now + physical.queue.value + physical.agent_start.value + repeated)
