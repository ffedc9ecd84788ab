"""The fixture `slurm`: a real Slurm for the session, skipped with the reason where there can be none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.e2e.site import Site

from . import cluster
from .day import CONFIG, ask, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A caller's own Slurm job or output formats must not reach the tests' commands.
SLURM_VARIABLES = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_")


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    """The cluster of `make slurm-up` if it is up, else one for this session; SLURM_CONF leads to it.

    Tests that run side by side have a cluster each.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    try:
        running = cluster.up(cluster.FOLDER.with_name(f"{cluster.FOLDER.name}-{worker}") if worker else cluster.FOLDER)
    except cluster.UnavailableError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(SLURM_VARIABLES)]:
            patch.delenv(name)
        for name, value in running.env.items():
            patch.setenv(name, value)
        yield running
    if not running.was_up:
        cluster.down(running.folder)


@pytest.fixture
def site(tmp_path: Path, slurm: cluster.Cluster) -> Iterator[Site]:
    """Four idle nodes before, and after."""
    site = Site(tmp_path, CONFIG)
    yield site
    site.close()
    for name in ("slurmdbd", "slurmctld"):
        slurm.start(name)
    ask("scancel", "--me", "--signal=KILL", "--full")
    ask("scancel", "--me")
    for node in slurm.nodes:
        slurm.revive_node(node)
    until(lambda: not ask("squeue", "-h"))
    slurm._resume()
    until(lambda: set(slurm.states().values()) == {"idle"})
