"""Three worlds behind the same ports, with one interface for tests: ask, lose the job, wait."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.drive import Pace, pass_time
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.ports import Request
from opt_ops.runfolder import lineages
from tests.e2e.site import Site
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start, without_sync

_VIRTUAL_PATIENCE = 20_000.0


class Stage(Protocol):
    """A lineage of two nodes and a spare, in training."""

    def ask(self, verb: str, **arguments: Any) -> None:
        """Leave a request for the daemon."""
        ...

    def lose_job(self) -> None:
        """Let the scheduler end the job without notice."""
        ...

    def wait(self, what: Callable[[State], Any]) -> Any:
        """Wait until `what` is true of the state. Returns its value."""
        ...


def trains_on(state: State, steps: int = 25) -> bool:
    """Whether the newest attempt has made that many steps, and has a good checkpoint of its own."""
    attempt = state.attempt
    if state.status is not Status.TRAINING or attempt is None or attempt.first_step is None:
        return False
    return any(k.good and k.checkpoint.step >= attempt.first_step + steps - 10 for k in state.checkpoints.values())


class Simulated:
    """The simulated cluster, in virtual time."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        without_sync(patch)
        self._asked = 0
        self._lives = SimulatedLineage(folder, (Planned(fault=start(), at=0.0),), physics(5000))
        self._lives.begin()

    def ask(self, verb: str, **arguments: Any) -> None:
        self._asked += 1
        self._lives.world.ask(Request(request=f"r-{self._asked}", author="ann", verb=verb, arguments=arguments))

    def lose_job(self) -> None:
        self._lives.world.strike(faults.EndJob())

    def wait(self, what: Callable[[State], Any]) -> Any:
        world, until = self._lives.world, self._lives.world.now + _VIRTUAL_PATIENCE
        while not (value := what(self._lives.state)):
            assert world.now < until, f"still {self._lives.state.status}"
            self._lives.tick()
            pass_time(world, until, Pace())
        return value

    def close(self) -> None:
        self._lives.end()


class Real:
    """Real agents and processes: on this machine, or on a real Slurm."""

    def __init__(self, site: Site, lose_job: Callable[[], None]) -> None:
        self._site = site
        self.lose_job = lose_job
        site.start("steps=100000", "pause=0.02")
        site.start_daemon()

    def ask(self, verb: str, **arguments: Any) -> None:
        lineages.ask(self._site.runs / "1", "ann", verb, arguments, 0.0)

    def wait(self, what: Callable[[State], Any]) -> Any:
        return self._site.wait(what)


def local(site: Site) -> Real:
    """Several nodes on this machine."""

    def lose_job() -> None:
        for pid in site.agents().values():
            os.kill(pid, signal.SIGKILL)

    return Real(site, lose_job)


def slurm(site: Site) -> Real:
    """Four nodes of a real Slurm."""

    def lose_job() -> None:
        subprocess.run(["scancel", "--me"], check=True)

    return Real(site, lose_job)
