"""Nodes that fall silent, on a real Slurm with four nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.site import SILENT_SECONDS, Site
from tests.slurm.day import Day, ask, until

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_a_node_falls_silent_and_touches_nothing_when_it_comes_back(site: Site, slurm: Cluster):
    day = Day(site)
    first, second = day.state.attempt.nodes
    slurm.kill_node(second)
    silent = day.sees("silent_node", nodes=(second,))
    assert silent.decision.exclude == (second,)
    assert second not in day.state.attempt.nodes
    assert first in day.state.attempt.nodes
    assert "silent" in ask("sinfo", "-h", "-R", "-o", "%E|%N")
    until(lambda: second not in ask("squeue", "-h", "--me", "-o", "%N"))
    attempt = day.attempt
    slurm.revive_node(second)
    site.looked(seconds=SILENT_SECONDS + 1)  # longer than a silence
    day.trained(5)
    assert day.attempt == attempt
    day.ends(excluded={second}, submitted=2)


@pytest.mark.soak  # in every run: the two below, and the simulation of all nodes
def test_all_nodes_at_once(site: Site, slurm: Cluster):
    day = Day(site)
    held = list(day.state.held)
    with ThreadPoolExecutor() as pool:
        list(pool.map(slurm.kill_node, held))
    for node in held:
        slurm.revive_node(node)
    # Slurm takes the job for running. While no node at all is heard, our own eyes might have failed: patience.
    lost = day.sees("silent_node")
    assert lost.evidence["seconds"] > 2 * SILENT_SECONDS, "others were heard at the earliest when these were replaced"
    assert lost.step_resumed == day.sound_before(lost.next_attempt)
    day.ends(excluded=lost.nodes)


def test_the_first_node_dies(site: Site, slurm: Cluster):
    """The one where Slurm runs the job's script and its srun."""
    day = Day(site)
    first, second = day.state.attempt.nodes
    slurm.kill_node(first)
    silent = day.sees("silent_node", nodes=(first,))
    assert silent.decision.exclude == (first,)
    assert second in day.state.attempt.nodes
    # Slurm ends no job before the last of its nodes has answered, or is down.
    day.ends(excluded={first}, submitted=2, meanwhile=lambda: slurm.revive_node(first))
