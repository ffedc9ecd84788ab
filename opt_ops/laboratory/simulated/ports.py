"""The ports of one life of the daemon onto a simulated world. What a life has read dies with it; the world does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.health import Heartbeat
from opt_ops.core.values import Checkpoint
from opt_ops.laboratory.simulated.world import EPOCH, World
from opt_ops.ports import Alert, JobState, NodeReport, Orders, Ports, Request, TrainerConfig, TrainerPhase


class SimulatedClock:
    """Virtual time; the wall clock of the daemon's host may be skewed."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> float:
        """Seconds since the epoch."""
        return EPOCH + self._world.now + self._world.skew

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return self._world.now


class SimulatedScheduler:
    """The scheduler's commands."""

    grace_seconds = 30.0

    def __init__(self, world: World) -> None:
        self._cluster = world.cluster

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job; its id."""
        return self._cluster.submit(allocation, nodes, exclude)

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Every queued or running job of the lineage, as (job, allocation)."""
        self._cluster.check_answers()
        return [(job.number, job.allocation) for job in self._cluster.live]

    def state(self, job: str) -> JobState:
        """What becomes of the job."""
        state = self._cluster.state(job)
        return state if state.ends_at is None else replace(state, ends_at=EPOCH + state.ends_at)

    def cancel(self, job: str) -> None:
        """End the job."""
        self._cluster.cancel(job)

    def drain(self, node: str, reason: str) -> None:
        """Give the node to nobody any more."""
        self._cluster.drain(node, reason)

    def remove_node(self, job: str, node: str) -> None:
        """Take a node out of the job."""
        self._cluster.remove_node(job, node)


class SimulatedAgents:
    """The agents' files."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._read: dict[str, float] = {}

    def heartbeats(self) -> Sequence[Heartbeat]:
        """The newest of each node, if it came since the last call."""
        return self._world.agents.heartbeats(self._read)

    def order(self, orders: Orders) -> None:
        """Make these the orders."""
        self._world.agents.order(orders)

    def reports(self, attempt: str) -> Mapping[str, NodeReport]:
        """By node."""
        return self._world.agents.reports(attempt)

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """The ranks' Python stacks taken for that dump."""
        training = self._world.trainings.get(attempt)
        return training.stacks.get(dump, {}) if training else {}


class SimulatedTrainer:
    """The trainer's files."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._read: dict[str, int] = {}
        self._phases_read: dict[str, int] = {}

    def config(self, attempt: str) -> TrainerConfig | None:
        """None until it is written."""
        training = self._world.trainings.get(attempt)
        return training.config if training else None

    def points(self, attempt: str) -> Sequence[Point]:
        """Telemetry since the last call."""
        training = self._world.trainings.get(attempt)
        if training is None:
            return ()
        new = training.points[self._read.get(attempt, 0) :]
        self._read[attempt] = len(training.points)
        return new

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """The changes of phase since the last call."""
        training = self._world.trainings.get(attempt)
        if training is None:
            return ()
        read = self._phases_read.get(attempt, 0)
        new = [phase for phase in training.phases[read:] if phase.since <= self._world.wall()]
        self._phases_read[attempt] = read + len(new)
        return new

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Put faults into the attempt's trainer."""
        if training := self._world.trainings.get(attempt):
            training.drills = list(drills)
            self._world.timeline.disturb()


class SimulatedCheckpoints:
    """The store; an examination takes its time, and dies with the daemon."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._born_at = world.now
        self._examining: dict[str, tuple[Checkpoint, float]] = {}

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Those of the run, oldest first."""
        return [saved.checkpoint for saved in self._world.checkpoints.values() if saved.checkpoint.run == run]

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin, unless it is under way. A supervisor that had looked since would have begun at once."""
        saved = self._world.checkpoints.get(checkpoint.path)
        ready = max(self._born_at, saved.committed_at if saved else 0.0) + self._world.costs.examine
        self._examining.setdefault(checkpoint.path, (checkpoint, ready))

    def pin(self, checkpoint: Checkpoint) -> None:
        """Nothing is pruned here but by age."""

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """Those that ended since the last call."""
        ended = [path for path, (_, ready) in self._examining.items() if ready <= self._world.now]
        return [(self._examining.pop(path)[0], self._problem(path)) for path in ended]

    def _problem(self, path: str) -> str:
        saved = self._world.checkpoints.get(path)
        return saved.damage if saved else "it is gone"


class SimulatedInbox:
    """Requests."""

    def __init__(self, world: World) -> None:
        self._world = world

    def requests(self) -> Sequence[Request]:
        """Those that are waiting."""
        return list(self._world.inbox.values())

    def done(self, request: str) -> None:
        """Take it out."""
        self._world.inbox.pop(request, None)


class SimulatedNotifier:
    """Collects alerts in the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: dict[str, float] = {}

    def send(self, alert: Alert) -> None:
        """Hand it over."""
        self._world.alerts.append((self._world.now, alert))
        self._sent[alert.id] = self._world.now + self._world.costs.deliver

    def delivered(self) -> Sequence[tuple[str, str]]:
        """Those that arrived since the last call."""
        arrived = [alert for alert, at in self._sent.items() if at <= self._world.now]
        for alert in arrived:
            del self._sent[alert]
        return [(alert, "") for alert in arrived]


def ports(world: World) -> Ports:
    """Fresh hands and eyes for one life of the daemon."""
    return Ports(
        clock=SimulatedClock(world),
        scheduler=SimulatedScheduler(world),
        agents=SimulatedAgents(world),
        trainer=SimulatedTrainer(world),
        checkpoints=SimulatedCheckpoints(world),
        inbox=SimulatedInbox(world),
        notifier=SimulatedNotifier(world),
    )
