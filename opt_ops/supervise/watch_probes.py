"""Watches probes: their telemetry shows whether the loss spiked, their nodes' reports whether they run."""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.core.decide.probes import died, verdict
from opt_ops.core.detect.point import Point
from opt_ops.core.events import Event, ProbesIntended
from opt_ops.core.events.probes import Probe
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import probing
from opt_ops.ports import Agents, CheckpointStore, Clock, Trainer

_REPORT_SECONDS = 5.0  # between two looks at the nodes' reports


class ProbeWatch:
    """Follows the probes of the incidents whose decisions wait for them."""

    def __init__(self, trainer: Trainer, agents: Agents, checkpoints: CheckpointStore, clock: Clock) -> None:
        self._trainer = trainer
        self._agents = agents
        self._checkpoints = checkpoints
        self._clock = clock
        self._points: dict[str, list[Point]] = {}
        self._looked_at: dict[str, float] = {}
        self._pinned: set[str] = set()

    def observe(self, state: State) -> Iterator[Event]:
        """Yield the ends of probes."""
        for incident in [state.incidents[name] for name in state.open_incidents]:
            if not probing(incident) or incident.probes is None:
                continue
            if incident.name not in self._pinned:  # training goes on, and prunes old checkpoints
                self._pinned.add(incident.name)
                self._checkpoints.pin(incident.probes.checkpoint)
            ended = {each.probe for each in incident.probe_ends}
            for probe in incident.probes.probes:
                if probe.kind not in ended:
                    yield from self._follow(incident.probes, probe)

    def _follow(self, intended: ProbesIntended, probe: Probe) -> Iterator[Event]:
        name = intended.name(probe)
        over = self._is_over(name, probe.node)  # before its telemetry is read: the last lines were written by then
        points = self._points.setdefault(name, [])
        points += self._trainer.points(name)
        if (found := verdict(intended, probe, points)) is not None:
            yield found
        elif over:
            yield died(intended, probe, points)

    def _is_over(self, name: str, node: str) -> bool:
        now = self._clock.monotonic()
        if now - self._looked_at.get(name, -_REPORT_SECONDS) < _REPORT_SECONDS:
            return False
        self._looked_at[name] = now
        report = self._agents.reports(name).get(node)
        return report is not None and report.done
