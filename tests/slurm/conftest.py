"""The fixture `slurm`: a real Slurm for the session, skipped with the reason where there can be none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.e2e.site import QUICK_HANG, QUICK_SILENCE, Site
from tests.processes import MARK

from . import cluster
from .day import CONFIG, ask, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    """The cluster of `make slurm-up` if it is up, else one for this session; SLURM_CONF leads to it.

    Tests that run side by side have a cluster each.
    """
    worker, run = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ[MARK].partition(".")[0])
    try:
        running = cluster.up(cluster.folder_of(worker, run) if worker else cluster.FOLDER)
    except cluster.UnavailableError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.env.items():
            patch.setenv(name, value)
        quiet(running)
        yield running
    if not running.was_up:
        cluster.down(running.folder)


def quiet(slurm: cluster.Cluster) -> None:
    """End all jobs, and have all nodes idle."""
    for name in ("slurmdbd", "slurmctld"):
        slurm.start(name)
    ask("scancel", "--me", "--signal=KILL", "--full")
    ask("scancel", "--me")
    for node in slurm.nodes:
        slurm.revive_node(node)
    until(lambda: not ask("squeue", "-h"))
    slurm._resume()
    until(lambda: set(slurm.states().values()) == {"idle"})


@pytest.fixture
def site(tmp_path: Path, slurm: cluster.Cluster, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Four idle nodes before, and after."""
    name = request.path.stem
    quick = QUICK_HANG if name == "test_suspended" or "hang" in request.node.name else {}
    silence = QUICK_SILENCE if name in ("test_suspended", "test_lost_nodes") else {}  # others allow for a busy machine
    site = Site(tmp_path, CONFIG, **quick, **silence)
    yield site
    site.close()
    quiet(slurm)
