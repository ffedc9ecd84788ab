"""One node dies: no healthy node is blamed, however late its heartbeat is read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from opt_ops.core.detect.point import Point
from opt_ops.core.events import AllocationIntended, AttemptEnded, Event, SignalRaised
from opt_ops.core.health import Heartbeat
from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import AllocationStatus, RankExit
from opt_ops.ports import NodeRanksReport
from opt_ops.supervise.watch_attempt import AttemptWatch
from opt_ops.supervise.watch_nodes import NodeWatch
from opt_ops.supervise.watch_training import TrainingWatch
from tests.core.story import POLICY, SCHEDULE, Story

SILENT = POLICY.silent_seconds


def planned_lr(step: int) -> float:
    return expected_lr(SCHEDULE, (), step)


class Daemon:
    """Holds n1 to n3, and an attempt runs on n1 and n2; looks every two seconds."""

    def __init__(self) -> None:
        self.story = Story().training()
        self.held_up_seconds = 0.0  # after the heartbeats were read
        self.bereaved: set[str] = set()  # nodes where a rank has lost a peer
        self.beats: list[Heartbeat] = []
        self.steps: list[Point] = []
        clock = SimpleNamespace(monotonic=lambda: self.story.now, now=lambda: self.story.now)
        trainer = SimpleNamespace(config=lambda _: None, phases=lambda _: (), points=lambda _: self._points())
        checkpoints = SimpleNamespace(
            committed=lambda _: [each.checkpoint for each in self.story.state.checkpoints.values()],
            examined=lambda: (),
            pin=lambda _: None,
        )
        self.agents = SimpleNamespace(heartbeats=lambda: self.beats, reports=lambda _: {}, stacks=lambda *_: {})
        self.training = TrainingWatch(self.story.policy, trainer, checkpoints, clock)
        allocation = SimpleNamespace(unfit={})
        self.nodes = NodeWatch(self.story.policy, allocation, self.training, self.agents, clock)
        self.attempt = AttemptWatch(self.story.policy, self.agents, self.nodes, self.training, clock)
        self.look("n1", "n2", "n3")

    def _points(self) -> list[Point]:
        new, self.steps = self.steps, []
        return new

    def look(self, *heard: str, seconds: float = 2.0) -> list[Event]:
        """One look after so many seconds; what it blames on nodes."""
        self.story.now += seconds
        beat = Heartbeat(node="", host="", ts=self.story.now, attempt=None, nvml="absent")
        told = {"attempt": self.story.state.attempt.name, "peer_lost": True} if self.story.state.attempt else {}
        self.beats = [replace(beat, node=n, host=n, **(told if n in self.bereaved else {})) for n in heard]
        seen: list[Event] = []
        for watcher in (self.nodes, self.training, self.attempt):
            for event in watcher.observe(self.story.state):
                seen.append(event)
                self.story.write(event)
            if watcher is self.nodes:
                self.story.now += self.held_up_seconds
        return [event for event in seen if isinstance(event, SignalRaised | AttemptEnded)]

    def look_on(self, *heard: str, seconds: float) -> list[Event]:
        """Looks every two seconds."""
        return [event for _ in range(int(seconds / 2)) for event in self.look(*heard)]


def test_the_node_that_died_is_blamed_alone():
    (signal,) = Daemon().look_on("n1", "n3", seconds=SILENT + 2.0)
    assert signal.nodes == ("n2",)


def test_the_node_that_died_is_blamed_early_where_its_peer_has_lost_somebody():
    daemon = Daemon()
    daemon.bereaved = {"n1"}
    (signal,) = daemon.look_on("n1", seconds=8.0)
    assert signal.nodes == ("n2",)
    assert "lost a peer" in signal.rule
    assert daemon.story.state.nodes["n2"].reason == "silent"
    assert daemon.story.state.nodes["n3"].reason != "silent", "nobody is connected to the spare"


def test_a_daemon_that_was_held_up_waits_for_the_next_heartbeat():
    daemon = Daemon()
    daemon.look_on("n1", "n3", seconds=6.0)
    assert daemon.look("n1", "n3", seconds=SILENT) == []
    assert daemon.look("n1", "n2", "n3") == []


def test_a_daemon_that_was_held_up_within_a_look_takes_nobody_for_silent():
    daemon = Daemon()
    daemon.held_up_seconds = 5 * SILENT
    assert daemon.look("n1", "n2", "n3") == []
    assert daemon.look("n1", "n2", "n3") == []


def test_steps_that_came_while_the_daemon_was_held_up_are_read_before_a_node_is_blamed():
    daemon = Daemon()
    daemon.look_on("n1", "n3", seconds=SILENT - 3.0)
    optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip_norm": 1.0}
    measured = {"loss": 3.0, "gnorm": 0.3, "finite": True, "step_seconds": 1.0, "tokens": 1, "wps": 1.0}
    daemon.steps = [Point(step=451, ts=daemon.story.now, lr=planned_lr(451), **optimizer, **measured)]
    assert daemon.look("n1", "n3", seconds=10.0) == []


def test_when_all_were_silent_and_one_is_heard_again_the_others_may_follow():
    daemon = Daemon()
    assert daemon.look_on(seconds=SILENT + 10.0) == []
    assert daemon.look("n1") == []
    assert daemon.look_on("n1", "n2", "n3", seconds=SILENT) == []


def test_a_replacement_that_was_not_heard_yet_blames_nobody():
    daemon = Daemon()
    daemon.look_on(seconds=SILENT + 10.0)
    story = daemon.story
    story.write(AllocationIntended(allocation="12-n1", nodes=1, exclude=(), why="test"))
    story.changed("12-n1", "n4")
    assert daemon.look() == []


def test_a_suspended_job_is_neither_silent_nor_hung_and_neither_is_the_pause_afterwards():
    daemon = Daemon()
    story = daemon.story
    holder = story.state.allocation
    patience = daemon.training._phase_times.timeout("training", story.policy.hang)
    story.changed(holder.name, *holder.nodes, status=AllocationStatus.SUSPENDED)
    assert daemon.look_on(seconds=3600.0) == []
    assert all(node.reason != "silent" for node in story.state.nodes.values())
    story.changed(holder.name, *holder.nodes)
    assert daemon.look_on(seconds=SILENT - 2.0) == []
    optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip_norm": 1.0}
    measured = {"loss": 3.0, "gnorm": 0.3, "finite": True, "tokens": 1, "wps": 1.0}
    for step, seconds in ((451, 1.0), (452, 3620.0)):
        daemon.steps = [
            Point(step=step, ts=story.now, lr=planned_lr(step), step_seconds=seconds, **optimizer, **measured)
        ]
        assert daemon.look("n1", "n2", "n3") == []
    assert daemon.training._phase_times.timeout("training", story.policy.hang) == patience, "no step took an hour"
    assert any(signal.signal == "silent_node" for signal in daemon.look_on("n1", "n3", seconds=2 * SILENT + 60.0))


def test_while_nobody_is_heard_no_node_is_called_silent():
    daemon = Daemon()
    daemon.look_on(seconds=SILENT + 10.0)
    assert {node.reason for node in daemon.story.state.nodes.values()} == {"unheard"}
    daemon.look("n1", "n3")
    daemon.look_on("n1", "n3", seconds=2 * SILENT)
    reasons = {name: node.reason for name, node in daemon.story.state.nodes.items()}
    assert reasons["n2"] == "silent"
    assert "silent" not in (reasons["n1"], reasons["n3"])


def test_a_daemon_that_was_held_up_while_a_rank_died_names_the_death_and_no_hang():
    daemon = Daemon()
    optimizer = {"betas": (0.9, 0.95), "weight_decay": 0.1, "clip_norm": 1.0}
    measured = {"loss": 3.0, "gnorm": 0.3, "finite": True, "step_seconds": 1.0, "tokens": 1, "wps": 1.0}
    for step in (451, 452, 453):
        daemon.steps = [Point(step=step, ts=daemon.story.now, lr=planned_lr(step), **optimizer, **measured)]
        assert daemon.look("n1", "n2", "n3") == []
    killed = RankExit(rank=1, node="n2", code=None, signal=9, at=daemon.story.now + 1.0)
    reports = {
        "n1": NodeRanksReport(node="n1", started_at=1.0, exits=(), done=False),
        "n2": NodeRanksReport(node="n2", started_at=1.0, exits=(killed,), done=True),
    }
    daemon.agents.reports = lambda _: reports
    raised = daemon.look("n1", "n2", "n3", seconds=600.0) + daemon.look_on("n1", "n2", "n3", seconds=6.0)
    assert [signal.signal for signal in raised] == ["process_death"]
