"""A simulated trainer goes on in newer generations of its members, as the orders say, or it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opt_ops.laboratory.simulated import Costs, Physics, World, faults
from opt_ops.laboratory.simulated.costs import InPlace
from opt_ops.laboratory.simulated.hosts import LoseHosts, ReplacementNode
from opt_ops.laboratory.simulated.in_place import keepers_of
from opt_ops.laboratory.simulated.ports import SimulatedAgents, SimulatedScheduler
from opt_ops.laboratory.simulated.training import Training
from opt_ops.ports import Launch, Membership, Orders

IN_PLACE = InPlace(notice=2.0, peers=4.0, join=12.0, state=3.0, warm=60.0)
NODES = ("n001", "n002", "n003", "n004")
RANKS = 2  # on each node


class Bench:
    """Four nodes that train, two spares with standby ranks, and a test in the place of the supervisor."""

    def __init__(self, in_place: InPlace | None = IN_PLACE) -> None:
        physics = Physics(nodes=6, gpus_per_node=RANKS, steps=1000, save_every=10, step_seconds=20.0)
        self.world = World(physics, Costs(in_place=in_place))
        self.agents = SimulatedAgents(self.world)
        SimulatedScheduler(self.world).submit("1-n0", 6, ())
        self.world.advance(60.0)
        self.order(NODES, 1)
        self.wait(400.0)

    @property
    def training(self) -> Training:
        return self.world.trainings["1.00-a0"]

    def order(self, nodes: tuple[str, ...], generation: int, *new: int) -> None:
        ranks = tuple((node, place) for node in nodes for place in range(RANKS))
        members = Membership(generation=generation, ranks=ranks, new=new, address="", port=2)
        spares = {node: RANKS for node in ("n005", "n006") if node not in nodes}
        launch = Launch(
            attempt="1.00-a0",
            nodes=nodes,
            holders=dict.fromkeys(nodes, "1-n0"),
            ranks_per_node=RANKS,
            address="",
            port=1,
            argv=("train", "--checkpoint-dir", "/c/1.00"),
            membership=members if generation > 1 else None,
            warm=dict.fromkeys((*nodes, *spares), "1-n0"),
            standbys=spares,
        )
        self.agents.order(Orders(epoch=1, seq=generation, launch=launch, drills=(), released=()))

    def wait(self, seconds: float) -> None:
        self.world.advance(self.world.now + seconds)

    def alive(self) -> set[str]:
        return self.world.alive().get("1.00-a0", set())


def lose(*nodes: str) -> LoseHosts:
    gone = (ReplacementNode(name="n009", after=1e9),)
    return LoseHosts(replacements=(gone,) * len(nodes), silent=True)


def test_without_the_table_the_peers_of_a_dead_rank_die():
    bench = Bench(in_place=None)
    bench.world.strike(faults.KillRank(rank=3))
    bench.wait(10.0)
    assert bench.alive() == set()


def test_a_rank_is_replaced_on_its_node_and_the_others_stay():
    bench = Bench()
    steps = bench.training.step
    bench.world.strike(faults.KillRank(rank=3))
    bench.wait(1.0)
    assert bench.alive() == set(NODES)
    (died,) = bench.agents.reports("1.00-a0")["n002"].exits
    assert (died.rank, died.signal, died.generation) == (3, 9, 1)
    bench.order(NODES, 2, 3)
    began = bench.world.now
    bench.wait(60.0)
    (rejoined,) = bench.training.rejoined
    membership = bench.training.launch.membership
    assert membership is not None
    assert (rejoined.generation, rejoined.step, membership.new) == (2, steps, (3,))
    assert rejoined.at == pytest.approx(began + 1.0 + 15.0)  # the notice ends 2 s after the death
    assert [point.step for point in bench.training.points] == list(range(1, bench.training.step + 1))
    assert bench.training.step > steps
    assert set(bench.world.agents.starts.values()) == {1}, "no rank was started twice"


def test_a_lost_host_is_replaced_by_a_spare_at_the_same_place():
    bench = Bench()
    bench.world.cluster.break_down("n002")
    bench.agents.heartbeats()
    bench.wait(3.9)
    assert not any(beat.peer_lost for beat in bench.agents.heartbeats())
    bench.wait(0.2)
    told = [beat.node for beat in bench.agents.heartbeats() if beat.peer_lost]
    assert told == ["n001", "n003", "n004"]
    bench.order(("n001", "n005", "n003", "n004"), 2, 2, 3)
    bench.wait(60.0)
    assert bench.training.generation == 2
    assert not any(beat.peer_lost for beat in bench.agents.heartbeats())
    assert bench.alive() == {"n001", "n005", "n003", "n004"}
    assert list(bench.world.agents.parts["1.00-a0"]["n005"].ranks) == [2, 3]


def test_a_node_that_comes_back_ends_its_ranks_and_disturbs_nobody():
    bench = Bench()
    bench.world.strike(faults.NodeCutOff(node="n002", seconds=120.0))
    bench.order(("n001", "n005", "n003", "n004"), 2, 2, 3)
    bench.wait(100.0)
    steps = bench.training.step
    assert bench.alive() == {"n001", "n002", "n003", "n004", "n005"}
    bench.wait(100.0)
    assert bench.alive() == {"n001", "n005", "n003", "n004"}
    assert bench.training.step >= steps + 4


def test_both_of_a_pair_are_lost_and_the_survivors_leave():
    bench = Bench()
    assert keepers_of(NODES)["n002"] == "n004"
    for name in ("n002", "n004"):
        bench.world.cluster.break_down(name)
    bench.order(("n001", "n005", "n003", "n006"), 2, 2, 3, 6, 7)
    bench.wait(60.0)
    assert bench.training.rejoined == []
    assert bench.alive() == set()
    assert {each.code for each in bench.agents.reports("1.00-a0")["n001"].exits} == {88}


@pytest.mark.parametrize("pair", [True, False])
def test_hosts_are_lost_as_a_pair_or_not_as_the_plan_says(pair: bool):
    bench = Bench()
    bench.world.strike(replace(lose("a", "b"), pair=pair))
    first, second = (name for name in NODES if not bench.world.cluster.nodes[name].up)
    assert (keepers_of(NODES)[first] == second) is pair


def test_survivors_wait_in_vain_for_a_replacement_that_fails():
    bench = Bench()
    bench.world.strike(faults.FailReplacements())
    bench.world.strike(faults.KillRank(rank=3))
    bench.order(NODES, 2, 3)
    bench.wait(100.0)
    assert bench.training.rejoined == []
    bench.order(NODES, 3, 3)
    bench.wait(60.0)
    assert [each.generation for each in bench.training.rejoined] == [3]


def test_a_rank_that_hangs_holds_up_the_generation_unless_it_is_replaced():
    bench = Bench()
    bench.world.strike(faults.Hang(rank=5))
    bench.world.strike(faults.KillRank(rank=0))
    bench.order(NODES, 2, 0)
    bench.wait(100.0)
    assert bench.training.rejoined == []
    bench.order(NODES, 3, 5)
    bench.wait(60.0)
    assert [each.generation for each in bench.training.rejoined] == [3]
    assert [each.signal for each in bench.agents.reports("1.00-a0")["n003"].exits] == [9]


def test_what_is_not_warm_takes_as_long_as_a_start():
    bench = Bench()
    bench.world.strike(faults.CoolStandbys())
    bench.world.cluster.break_down("n002")
    bench.order(("n001", "n005", "n003", "n004"), 2, 2, 3)
    began = bench.world.now
    bench.wait(100.0)
    (rejoined,) = bench.training.rejoined
    assert rejoined.at > began + bench.world.costs.startup


def test_a_save_in_flight_is_given_up_and_the_next_step_is_saved():
    bench = Bench()
    while bench.training.step % 10:
        bench.wait(1.0)
    saved, step = len(bench.world.checkpoints), bench.training.step
    bench.world.strike(faults.KillRank(rank=3))
    bench.order(NODES, 2, 3)
    bench.wait(120.0)
    steps = [stored.checkpoint.step for stored in bench.world.checkpoints.values()]
    assert step not in steps
    assert steps[saved] == step + 1


def test_a_world_in_which_ranks_were_replaced_is_the_same_with_the_same_seed():
    def played() -> list[float]:
        bench = Bench()
        bench.world.strike(faults.Later(fault=faults.KillRank(rank=1), seconds=7.5))
        bench.wait(10.0)
        bench.order(NODES, 2, 1)
        bench.wait(300.0)
        assert bench.training.rejoined
        return [point.ts for point in bench.training.points]

    assert played() == played()
