"""What the GPUs of held nodes use, from the counters in their heartbeats: for the ledger."""

from __future__ import annotations

from opt_ops.core.events import EnergyMetered
from opt_ops.core.health.readings import Heartbeat

_EVERY_SECONDS = 600.0  # between two accounts: 144 entries a day


class EnergyMeter:
    """Sums up what the counters of each node gained between two of its heartbeats.

    A counter that fell (the driver was reloaded, a GPU is gone) begins again and adds nothing. What nodes used while
    no daemon listened is not known.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}
        self._joules = 0.0
        self._since: float | None = None
        self._until = 0.0

    def add(self, heartbeat: Heartbeat) -> None:
        """A held node's heartbeat."""
        if heartbeat.energy_joules is None:
            self._last.pop(heartbeat.node, None)
            return
        before = self._last.get(heartbeat.node)
        self._last[heartbeat.node] = (heartbeat.energy_joules, len(heartbeat.gpus))
        self._since = heartbeat.ts if self._since is None else self._since
        self._until = max(self._until, heartbeat.ts)
        if before is not None and before[1] == len(heartbeat.gpus):
            self._joules += max(0.0, heartbeat.energy_joules - before[0])

    def account(self, last: bool) -> EnergyMetered | None:
        """What was used since the account before, once it is time; `last`: the lineage has ended."""
        if self._since is None or self._joules <= 0 or not (last or self._until - self._since >= _EVERY_SECONDS):
            return None
        gpus = sum(number for _, number in self._last.values())
        metered = EnergyMetered(since=self._since, until=self._until, joules=self._joules, gpus=gpus)
        self._since, self._joules = self._until, 0.0
        return metered
