"""A lineage in a simulated world. Its daemon can be killed at any boundary, and the next daemon process started."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import opt_ops.runfolder.journal
import opt_ops.supervise.supervisor
from opt_ops import playbook_loader
from opt_ops.core.events import Entry, LineageCancelled
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.core.values import Schedule, Severity
from opt_ops.laboratory.simulated import Costs, Physics, World, faults, run
from opt_ops.laboratory.simulated.drive import Pace
from opt_ops.laboratory.simulated.ports import ports
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import Journal, read
from opt_ops.supervise.executor import Site
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor

POLICY = replace(playbook_loader.load(playbook_loader.folder(), expected_gpus=1)[0], least_alert=Severity.WARNING)
SITE = Site(folder="/sim/1", trainer=("train",))

# Calls of the ports that have an effect on the world. All other calls only read.
EFFECTS = {
    "scheduler": ("submit", "cancel", "drain"),
    "agents": ("order",),
    "trainer": ("inject",),
    "inbox": ("done",),
    "notifier": ("send",),
}


class Killed(BaseException):
    """The daemon is killed here. Nothing catches this."""


class Boundaries:
    """Counts the boundaries at which a daemon may die, and kills it at one of them."""

    def __init__(self, fatal: int | None = None) -> None:
        self.passed: list[str] = []
        self.effects: Counter[str] = Counter()
        self.fatal = fatal

    def here(self, what: str, on_death: Callable[[], None] = lambda: None) -> None:
        """Pass a boundary. `on_death` runs if the daemon dies at this one."""
        self.passed.append(what)
        if len(self.passed) - 1 == self.fatal:
            on_death()
            raise Killed(what)


class Guarded:
    """A port with a boundary before and after each effect."""

    def __init__(self, port: Any, name: str, boundaries: Boundaries) -> None:
        self._port, self._name, self._boundaries = port, name, boundaries

    def __getattr__(self, attribute: str) -> Any:
        method = getattr(self._port, attribute)
        if attribute not in EFFECTS.get(self._name, ()):
            return method

        def effect(*arguments: Any) -> Any:
            self._boundaries.here(f"before {attribute}")
            result = method(*arguments)
            self._boundaries.effects[attribute] += 1
            self._boundaries.here(f"after {attribute}")
            return result

        return effect


def start(lineage: str = "1", **shape: int) -> faults.Ask:
    """The request that starts the lineage."""
    arguments = {
        "lineage": lineage,
        "recipe": "opt-sim",
        "settings": [],
        "data": [],
        "tokenizer": None,
        "shape": {"nodes": 2, "spares": 1, "ranks_per_node": 1, **shape},
    }
    return faults.Ask(request="r-start", verb="start", arguments=arguments)


def physics(steps: int, **other: Any) -> Physics:
    """Eight nodes with one GPU each. A short training with a long plateau: the detectors learn their band soon."""
    schedule = Schedule(peak_lr=1e-4, warmup_steps=10, total_steps=steps, final_fraction=0.1)
    return Physics(**{"nodes": 8, "gpus_per_node": 1, "steps": steps, "schedule": schedule, "loss_knee": 2.0, **other})


class SimulatedLineage:
    """One lineage: its world, its journal, and its supervisors, one after the other."""

    def __init__(
        self,
        folder: Path,
        plan: Sequence[Planned],
        physics: Physics,
        costs: Costs | None = None,
        boundaries: Boundaries | None = None,
    ) -> None:
        self.folder = folder
        self.world = World(physics, costs, plan)
        self.boundaries = boundaries or Boundaries()
        self.supervisor: Supervisor | None = None
        self.most_live: Counter[str] = Counter()
        """Highest number of jobs of one allocation that were live at the same time."""
        self.open_journals: list[Journal] = []

    def begin(self) -> Supervisor:
        """Start a new daemon process."""
        self.end()
        boundaries, journals = self.boundaries, self.open_journals

        class Breakable(Journal):
            def __init__(self, folder: Path) -> None:
                super().__init__(folder)
                journals.append(self)

            def append(self, entry: Entry) -> None:
                boundaries.here("before append")
                boundaries.here("torn append", lambda: self._tear(entry))
                super().append(entry)
                boundaries.here("after append")

            def _tear(self, entry: Entry) -> None:
                line = opt_ops.runfolder.journal._line(entry)
                os.write(self._descriptor, line[: len(line) // 2])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opt_ops.supervise.supervisor, "Journal", Breakable)
            real = ports(self.world)
            guarded = {name: Guarded(getattr(real, name), name, boundaries) for name in Ports.__dataclass_fields__}
            identity = DaemonIdentity(host="head", pid=1, last_liveness=None)
            self.supervisor = Supervisor(self.folder, Ports(**guarded), POLICY, SITE, identity)
        return self.supervisor

    def end(self) -> None:
        """End the daemon process. Only its open files are closed."""
        self.supervisor = None
        while self.open_journals:
            self.open_journals.pop().close()  # a killed daemon leaves its file, even an empty one

    def tick(self) -> bool:
        """Tick the supervisor, and look at the world."""
        assert self.supervisor is not None
        try:
            return self.supervisor.tick()
        finally:
            live = Counter(job.allocation for job in self.world.cluster.live)
            self.most_live = self.most_live | live

    @property
    def state(self) -> State:
        assert self.supervisor is not None
        return self.supervisor.state

    def drive(self, until: float, unwatched: float = 7.0, tick: float = 5.0, settle: float = 180.0) -> State:
        """Run until the lineage is finished, or `until`. A killed daemon is replaced after `unwatched` seconds."""
        while True:
            try:
                if self.supervisor is None:
                    self.begin()
                run(self.world, self, until, Pace(tick=tick, settle=settle))
            except Killed:
                self.end()
                self.world.advance(self.world.now + unwatched)
            else:
                return self.state

    def entries(self) -> list[Entry]:
        """Return the journal on the disk."""
        return read(self.folder / "journal")[0]

    def replayed(self) -> State:
        """Return the state by the journal on the disk."""
        return replay(self.entries())


def answers(entries: Sequence[Entry]) -> Counter[str]:
    """Count the answers to each request. The event that cancels a lineage is a consequence, not a second answer."""
    answered = (entry.event for entry in entries if not isinstance(entry.event, LineageCancelled))
    return Counter(name for event in answered if (name := getattr(event, "request", None)) is not None)


def without_sync(patch: pytest.MonkeyPatch) -> None:
    """Replace syncs by nothing: a daemon that dies inside this process loses nothing that it wrote."""
    patch.setattr(os, "fdatasync", lambda _: None)
    patch.setattr(os, "fsync", lambda _: None)
