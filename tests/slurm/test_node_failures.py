"""Nodes that are bad, slow or used up, on a real Slurm with four nodes."""

from __future__ import annotations

import pytest

from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from tests.e2e.site import Site
from tests.slurm.day import Day, ask

pytestmark = pytest.mark.slurm


def test_nodes_that_are_bad_or_slow(site: Site):
    day = Day(site, "pause=0.01")
    first, second = day.state.attempt.nodes
    spare = next(node for node in day.state.held if node not in (first, second))

    site.command("drill", "xid", "1", "--node", spare, "--xid", "79", "--yes", "-q")
    idle = day.sees("bad_gpu", nodes=(spare,))
    assert (idle.decision.action, len(day.state.attempts)) == (Action.EXCLUDE, 1), "training is not touched"
    assert f"{idle.name}: xid_79" in ask("sinfo", "-h", "-R", "-o", "%E|%N")
    site.wait(lambda state: len(state.held) == 4)
    other = next(node for node in day.state.held if node not in (first, second, spare))
    site.wait(lambda state: other in state.nodes)

    site.command("drill", "xid", "1", "--node", second, "--xid", "79", "--yes", "-q")
    used = day.sees("bad_gpu", nodes=(second,))
    assert used.decision.action is Action.RESTART
    assert set(day.state.attempt.nodes) == {first, other}
    day.allow(spare, second)

    ranked = day.state.attempt.nodes[1]
    slow = day.fault("slow", "straggler", nodes=(ranked,))
    assert slow.evidence["ratio"] == pytest.approx(3.0)
    assert slow.step_resumed >= day.saved_before_it_left(slow.attempt)
    assert ranked not in day.state.attempt.nodes
    day.ends(excluded={ranked}, submitted=2)


@pytest.mark.soak  # in every run: e2e/test_scenarios.py, and the simulation
def test_all_spares_used_up(site: Site):
    day = Day(site, nodes=3, spares=1)
    first, second, third = day.state.attempt.nodes
    site.command("drill", "xid", "1", "--node", third, "--xid", "79", "--yes", "-q")
    day.sees("bad_gpu", nodes=(third,))
    attempt = day.state.attempt
    assert {first, second} < set(attempt.nodes)

    site.command("drill", "xid", "1", "--node", second, "--xid", "79", "--yes", "-q")
    day.expected.append("bad_gpu")
    waiting = site.wait(lambda state: len(state.incidents) == 2 and not state.attempt.live and state)
    assert waiting.attempt.name == attempt.name
    site.looked(seconds=5)
    assert day.attempt == attempt.name, "it waits for a third node"
    assert day.state.status in (Status.RECOVERING, Status.QUEUED)
    day.allow(second)
    back = site.wait(lambda state: next((i for i in state.incidents.values() if i.name == "1-i001" and i.proven), None))
    assert back.nodes == (second,)
    assert set(day.state.attempt.nodes) == {*attempt.nodes}
    day.ends(excluded={third})


@pytest.mark.soak  # in every run: e2e/test_people.py
def test_fewer_nodes_and_more_again(site: Site):
    day = Day(site, nodes=4, spares=0, min_nodes=3)
    bad = day.state.attempt.nodes[3]
    site.command("drill", "xid", "1", "--node", bad, "--xid", "79", "--yes", "-q")
    day.sees("bad_gpu", nodes=(bad,))
    assert len(day.state.attempt.nodes) == 3
    day.allow(bad)
    returned = day.sees("nodes_returned")
    assert len(day.state.attempt.nodes) == 4
    assert returned.step_resumed >= day.saved_before_it_left(returned.attempt)
    day.ends()
