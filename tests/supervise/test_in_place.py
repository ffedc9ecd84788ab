"""Losses of a running attempt, and its memberships, as the watchers tell them and as the agents are ordered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from opt_ops.contract.replacing import CAPABILITY
from opt_ops.core import events as e
from opt_ops.core.detect.point import Point
from opt_ops.core.health import Heartbeat
from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import RankExit, Shape
from opt_ops.ports import NodeRanksReport, Rejoined
from opt_ops.supervise.executor import Site, orders_of
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.watch_attempt import AttemptWatch
from opt_ops.supervise.watch_members import MembersWatch
from opt_ops.supervise.watch_nodes import NodeWatch
from opt_ops.supervise.watch_training import TrainingWatch
from tests.core.story import POLICY, Story

SITE = Site(folder="/runs/12", trainer=("python", "-m", "trainer"))
FOUR = Shape(nodes=4, spares=2, ranks_per_node=2)


class Daemon:
    """Holds n1 to n6. An attempt runs on n1 to n4, two ranks each, and a look follows the other after 0.5 s."""

    def __init__(self, *capabilities: str, late_spares: bool = False) -> None:
        self.story = Story(shape=FOUR)
        self.story.capabilities = capabilities or (CAPABILITY, "warm_start")
        self.story.begin()
        self.story.hold("n1", "n2", "n3", "n4", *(() if late_spares else ("n5", "n6")))
        self.story.see(seconds=POLICY.join_seconds)
        self.story.train(450)
        if late_spares:
            self.story.see(seconds=60.0)  # spares are asked for
            self.story.hold("n5", "n6")
        self.standby = {"n5": 2, "n6": 2}
        self.ends: dict[int, list[RankExit]] = {}
        self.pids = {rank: (1, 100 + rank, 1_000.0) for rank in range(8)}
        self.joining: dict[int, int] = {}
        self.joined: list[Rejoined] = []
        self.steps: list[Point] = []
        self.new_process()
        self.look()

    def new_process(self) -> None:
        """The watchers of a daemon process that has just started."""
        clock = SimpleNamespace(monotonic=lambda: self.story.now, now=lambda: self.story.now)
        trainer = SimpleNamespace(
            config=lambda _: None,
            phases=lambda _: (),
            points=lambda _: self._new(self.steps),
            members=lambda _: tuple(self.joined),
        )
        checkpoints = SimpleNamespace(committed=lambda _: (), examined=lambda: (), pin=lambda _: None)
        agents = SimpleNamespace(heartbeats=self._beats, reports=lambda _: self.reports(), stacks=lambda *_: {})
        self.training = TrainingWatch(POLICY, trainer, checkpoints, clock)
        nodes = NodeWatch(POLICY, SimpleNamespace(unfit={}), self.training, agents, clock)
        attempts = AttemptWatch(POLICY, agents, nodes, self.training, clock)
        self.watchers = (nodes, MembersWatch(POLICY, trainer, agents, clock, Guard(clock)), self.training, attempts)

    @staticmethod
    def _new(queue: list[Point]) -> list[Point]:
        new, queue[:] = list(queue), []
        return new

    def _beats(self) -> list[Heartbeat]:
        beat = Heartbeat(node="", host="", ts=self.story.now, attempt=None, nvml="absent")
        names = self.story.state.held
        return [replace(beat, node=name, host=name, standby=self.standby.get(name, 0)) for name in names]

    def reports(self) -> dict[str, NodeRanksReport]:
        """What the agents say: the processes that run, and how others have ended."""
        attempt = self.story.state.attempt
        generations = [attempt.nodes_in(number) for number in range(1, attempt.generation + 1)]
        found: dict[str, NodeRanksReport] = {}
        for name in dict.fromkeys(name for nodes in generations for name in nodes):
            places = {nodes.index(name) for nodes in generations if name in nodes}
            here = [rank for place in places for rank in (2 * place, 2 * place + 1)]
            exits = tuple(ended for rank in here for ended in self.ends.get(rank, ()) if ended.node == name)
            running = {rank: self.pids[rank] for rank in here if name == attempt.nodes[rank // 2] and rank in self.pids}
            joining = {rank: self.joining[rank] for rank in running if rank in self.joining}
            found[name] = NodeRanksReport(
                node=name, started_at=1_000.0, exits=exits, done=not running, pids=running, joining=joining
            )
        return found

    def die(self, rank: int, signal: int | None = 9, code: int | None = None) -> None:
        """The process of a rank ends."""
        attempt = self.story.state.attempt
        self.pids.pop(rank)
        ended = RankExit(
            rank=rank,
            node=attempt.nodes[rank // 2],
            code=code,
            signal=None if code is not None else signal,
            at=self.story.now,
            generation=attempt.generation,
        )
        self.ends.setdefault(rank, []).append(ended)

    def starts(self, *ranks: int) -> None:
        """Agents follow the newest order."""
        generation = self.story.state.attempt.generation
        self.pids |= {rank: (generation, 1000 * generation + rank, self.story.now) for rank in ranks}

    def replaces_rank_3(self) -> None:
        """Rank 3 dies on n2. Ranks 2 and 3 start on n5, as the orders say."""
        self.die(3)
        self.look()
        self.starts(2, 3)

    def look(self, seconds: float = 0.5) -> list[e.Event]:
        """One look; what is seen and decided."""
        self.story.now += seconds
        seen: list[e.Event] = []
        for watcher in self.watchers:
            for event in watcher.observe(self.story.state):
                seen.append(event)
                self.story.write(event)
        return [*seen, *self.story.decide()]

    def look_on(self, seconds: float) -> list[e.Event]:
        return [event for _ in range(int(2 * seconds)) for event in self.look()]

    def say(self, step: int) -> None:
        """The trainer writes a line of telemetry."""
        optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip_norm": 1.0}
        measured = {"loss": 3.0, "gnorm": 0.3, "finite": True, "step_seconds": 1.0, "tokens": 1, "wps": 1.0}
        self.steps.append(Point(step=step, ts=self.story.now, lr=planned(self.story, step), **optimizer, **measured))


def planned(story: Story, step: int) -> float:
    return expected_lr(story.schedule, (), step)


def of(events: Sequence[e.Event], kind: type) -> list[e.Event]:
    return [event for event in events if isinstance(event, kind)]


def test_warm_ranks_are_journaled_when_their_number_changes():
    daemon = Daemon()
    assert {name: node.standby for name, node in daemon.story.state.nodes.items() if node.standby} == daemon.standby
    assert of(daemon.look(), e.StandbySeen) == []
    daemon.standby["n6"] = 1
    assert of(daemon.look(), e.StandbySeen) == [e.StandbySeen(node="n6", ready=1)]


def test_where_peers_outlive_a_death_it_is_told_at_once_and_elsewhere_after_a_moment():
    daemon, other = Daemon(), Daemon("nothing")
    for each in (daemon, other):
        each.die(3)
    (raised,) = of(daemon.look(), e.SignalRaised)
    assert (raised.signal, raised.evidence["lost_ranks"], raised.generation) == ("process_death", [3], 1)
    assert of(other.look(), e.SignalRaised) == []
    (raised,) = of(other.look_on(2), e.SignalRaised)
    assert "lost_ranks" not in raised.evidence


def test_the_end_of_a_process_that_was_replaced_is_history():
    daemon = Daemon()
    daemon.die(3)
    (order,) = of(daemon.look(), e.MembersIntended)
    assert (order.nodes, order.new) == (("n1", "n5", "n3", "n4"), (2, 3))
    assert of(daemon.look_on(5), (e.SignalRaised, e.AttemptEnded)) == []
    daemon.starts(2, 3)
    assert of(daemon.look_on(5), (e.SignalRaised, e.AttemptEnded)) == []


def test_a_further_loss_is_told_in_its_generation_and_losses_of_a_moment_are_one():
    daemon = Daemon()
    daemon.replaces_rank_3()
    daemon.die(4)
    assert of(daemon.look(), e.SignalRaised) == []
    daemon.die(5)
    seen = daemon.look()
    (raised,) = of(seen, e.SignalRaised)
    assert (raised.generation, raised.evidence["lost_ranks"]) == (2, [4, 5])
    (order,) = of(seen, e.MembersIntended)
    assert (order.generation, order.new) == (3, (2, 3, 4, 5))
    assert of(daemon.look_on(5), e.SignalRaised) == []


def test_a_newcomer_that_dies_is_a_further_loss():
    daemon = Daemon()
    daemon.replaces_rank_3()
    daemon.standby["n5"] = 0
    daemon.die(3)
    (order,) = of(daemon.look_on(1), e.MembersIntended)
    assert (order.generation, order.nodes) == (3, ("n1", "n6", "n3", "n4"))


def test_no_common_step_is_a_restart_at_once():
    daemon = Daemon()
    daemon.replaces_rank_3()
    for rank in range(8):
        daemon.die(rank, code=88)
    seen = daemon.look()
    (failed,) = of(seen, e.MembersFailed)
    assert "no common step" in failed.why
    assert of(seen, e.AttemptIntended)
    daemon.joined = [Rejoined(generation=2, step=450, at=daemon.story.now)]
    assert of(daemon.look(), e.MembersJoined) == [], "nothing is joined any more"


@pytest.mark.parametrize("restarted", [False, True], ids=["same_daemon", "next_daemon"])
def test_joined_with_the_processes_that_stayed(restarted: bool):
    daemon = Daemon()
    daemon.replaces_rank_3()
    daemon.joined = [Rejoined(generation=1, step=99, at=1.0), Rejoined(generation=2, step=451, at=daemon.story.now)]
    if restarted:
        daemon.new_process()
    (joined,) = of(daemon.look(), e.MembersJoined)
    assert (joined.generation, joined.step, joined.kept) == (2, 451, 6)
    assert of(daemon.look_on(2), e.MembersJoined) == []


def test_a_process_that_is_another_one_was_not_kept():
    daemon = Daemon()
    daemon.replaces_rank_3()
    daemon.pids[7] = (1, 4711, 1_000.0)
    daemon.joined = [Rejoined(generation=2, step=451, at=daemon.story.now)]
    (joined,) = of(daemon.look(), e.MembersJoined)
    assert joined.kept == 5


@pytest.mark.parametrize("restarted", [False, True], ids=["same_daemon", "next_daemon"])
def test_the_first_steps_afterwards_prove_it(restarted: bool):
    daemon = Daemon()
    daemon.say(449)
    daemon.say(450)
    daemon.look()
    daemon.replaces_rank_3()
    daemon.joined = [Rejoined(generation=2, step=451, at=daemon.story.now)]
    daemon.say(451)  # the line of rank 0 that was missing
    daemon.look()
    if restarted:
        daemon.new_process()
        for step in (449, 450, 451):
            daemon.say(step)
    closed: list[e.Event] = []
    for step in range(452, 458):
        daemon.say(step)
        closed += of(daemon.look(), e.IncidentClosed)
    (closed_one,) = closed
    assert closed_one.proven, closed_one.proof
    assert (closed_one.step_resumed, closed_one.proof["first_step"], closed_one.proof["pids_kept"]) == (451, 452, True)


def test_no_hang_while_ranks_are_replaced_and_the_deadline_decides():
    daemon = Daemon()
    daemon.say(450)
    daemon.look()
    daemon.replaces_rank_3()
    seen = daemon.look_on(POLICY.in_place_seconds + 5)
    assert of(seen, e.SignalRaised) == []
    (failed,) = of(seen, e.MembersFailed)
    assert "not all ranks had joined" in failed.why


@pytest.mark.parametrize("restarted", [False, True], ids=["same_daemon", "new_daemon"])
def test_a_survivor_that_does_not_join_is_stuck_and_is_replaced_too(restarted: bool):
    daemon = Daemon()
    daemon.die(1)
    daemon.look()
    daemon.starts(0, 1)
    daemon.joining = dict.fromkeys((0, 1, 2, 4, 5, 6, 7), 2)
    patience = POLICY.in_place_seconds / 3
    assert of(daemon.look_on(patience - 2), e.SignalRaised) == []
    if restarted:
        daemon.new_process()
    events = daemon.look_on(4)
    (raised,) = of(events, e.SignalRaised)
    assert (raised.signal, raised.evidence["lost_ranks"], raised.nodes) == ("hang", [3], ("n2",))
    (order,) = of(events, e.MembersIntended)
    assert (order.generation, order.nodes, order.new) == (3, ("n5", "n6", "n3", "n4"), (0, 1, 2, 3))
    assert len(daemon.story.state.incidents) == 1
    daemon.starts(0, 1, 2, 3)
    daemon.joining = dict.fromkeys(range(8), 3)
    assert of(daemon.look_on(patience + 2), e.SignalRaised) == []


@pytest.mark.parametrize(
    "joining", [{}, dict.fromkeys(range(8), 2)], ids=["a_trainer_that_does_not_say_it", "all_join"]
)
def test_who_has_joined_or_cannot_say_so_is_not_stuck(joining: dict[int, int]):
    daemon = Daemon()
    daemon.die(1)
    daemon.look()
    daemon.starts(0, 1)
    daemon.joining = joining
    assert of(daemon.look_on(POLICY.in_place_seconds - 2), e.SignalRaised) == []


def test_a_node_of_a_newer_allocation_that_was_swapped_in_is_not_lost():
    daemon = Daemon(late_spares=True)
    assert daemon.story.state.held["n5"].name != daemon.story.state.held["n1"].name
    daemon.die(3)
    (order,) = of(daemon.look(), e.MembersIntended)
    assert order.nodes == ("n1", "n5", "n3", "n4")
    daemon.starts(2, 3)
    for rank in range(8):
        if rank not in (2, 3):
            daemon.die(rank, code=0)
    assert of(daemon.look_on(3), e.AttemptEnded) == [], "ranks run on n5"


# ---- orders


def test_nothing_is_warm_before_the_first_step_or_for_a_trainer_that_cannot():
    story = Story(shape=FOUR)
    story.capabilities = (CAPABILITY, "warm_start")
    story.begin()
    story.hold("n1", "n2", "n3", "n4", "n5", "n6")
    launch = orders_of(story.state, SITE).launch
    assert (launch.membership, launch.warm, launch.standbys) == (None, {}, {})
    assert orders_of(Daemon("nothing").story.state, SITE).launch.warm == {}


def test_spares_keep_a_warm_rank_for_each_place_and_nodes_in_use_one():
    state = Daemon().story.state
    launch = orders_of(state, SITE).launch
    assert launch.warm == {f"n{number}": "12-n0" for number in range(1, 7)}
    assert launch.standbys == {"n5": 2, "n6": 2, "n1": 1, "n2": 1, "n3": 1, "n4": 1}
    assert orders_of(state, replace(SITE, standby=False)).launch.warm == {}
    assert orders_of(state, replace(SITE, in_place=False)).launch.standbys == {}


def test_with_one_rank_on_a_node_a_node_in_use_keeps_one_only_where_there_is_no_spare():
    for spares, expected in ((1, {"n3": 1}), (0, {"n1": 1, "n2": 1})):
        story = Story(shape=Shape(nodes=2, spares=spares, ranks_per_node=1))
        story.capabilities = (CAPABILITY, "warm_start")
        story.begin()
        story.hold(*[f"n{number + 1}" for number in range(2 + spares)])
        story.train(10)
        assert orders_of(story.state, SITE).launch.standbys == expected


def test_a_membership_is_ordered_with_a_port_of_its_own_and_stays_the_same():
    daemon = Daemon()
    before = orders_of(daemon.story.state, SITE).launch
    daemon.die(1)
    daemon.look()
    launch = orders_of(daemon.story.state, SITE).launch
    members = launch.membership
    assert (members.generation, members.new, launch.nodes) == (2, (0, 1), ("n5", "n2", "n3", "n4"))
    assert members.ranks[:3] == (("n5", 0), ("n5", 1), ("n2", 0))
    assert members.port != before.port
    assert members.address == "n5"
    assert launch.holders["n5"] == "12-n0"
    assert launch.standbys["n1"] == 2, "the old node is fit, and a spare now"
    daemon.starts(0, 1)
    daemon.joined = [Rejoined(generation=2, step=451, at=daemon.story.now)]
    daemon.look()
    assert orders_of(daemon.story.state, SITE).launch == launch
