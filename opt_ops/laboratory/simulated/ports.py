"""The ports of one daemon process onto a simulated world. What it has read is lost with it; the world is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.health import Heartbeat
from opt_ops.core.values import Checkpoint
from opt_ops.laboratory.simulated.world import EPOCH, World
from opt_ops.ports import (
    Alert,
    EvaluationOrder,
    JobState,
    NodeRanksReport,
    Orders,
    Ports,
    Rejoined,
    Request,
    TrainerConfig,
    TrainerPhase,
)


class SimulatedClock:
    """Virtual time. The wall clock of the daemon's host may be wrong (`World.skew`)."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> float:
        """Seconds since the epoch."""
        return EPOCH + self._world.now + self._world.skew

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return self._world.now

    def boot(self) -> str:
        """The host is never booted again."""
        return "simulated"


class SimulatedScheduler:
    """The scheduler's commands."""

    grace_seconds = 30.0

    def __init__(self, world: World) -> None:
        self._cluster = world.cluster

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Submit a job. Returns its id."""
        return self._cluster.submit(allocation, nodes, exclude)

    def jobs(self) -> Sequence[tuple[str, str]]:
        """Return (job, allocation) of every queued or running job."""
        self._cluster.check_answers()
        return [(job.number, job.allocation) for job in self._cluster.live]

    def state(self, job: str, allocation: str = "", since: float = 0.0) -> JobState:  # noqa: ARG002
        """Return the state of a job."""
        state = self._cluster.state(job)
        return state if state.ends_at is None else replace(state, ends_at=EPOCH + state.ends_at)

    def cancel(self, job: str) -> None:
        """Cancel a job."""
        self._cluster.cancel(job)

    def drain(self, node: str, reason: str) -> None:
        """Drain a node."""
        self._cluster.drain(node, reason)

    def remove_node(self, job: str, node: str) -> None:
        """Remove a node from a job."""
        self._cluster.remove_node(job, node)


class SimulatedAgents:
    """The agents' files."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._read: dict[str, float] = {}

    def heartbeats(self) -> Sequence[Heartbeat]:
        """Return the newest heartbeat of each node, if it is new since the last call."""
        return self._world.agents.heartbeats(self._read)

    def order(self, orders: Orders) -> None:
        """Replace the orders."""
        self._world.agents.order(orders)

    def reports(self, attempt: str) -> Mapping[str, NodeRanksReport]:
        """Return the reports on an attempt, by node."""
        return self._world.agents.reports(attempt)

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """Return the stacks of a dump, by rank."""
        training = self._world.trainings.get(attempt)
        return training.stacks.get(dump, {}) if training else {}


class SimulatedTrainer:
    """The trainer's files."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._read: dict[str, int] = {}
        self._phases_read: dict[str, int] = {}
        self._rejoined_read: dict[str, int] = {}

    def config(self, attempt: str) -> TrainerConfig | None:
        """Return the settings; None until they are written."""
        training = self._world.trainings.get(attempt)
        return training.config if training else None

    def points(self, attempt: str) -> Sequence[Point]:
        """Return the telemetry since the last call."""
        training = self._world.trainings.get(attempt)
        if training is None:
            return ()
        new = training.points[self._read.get(attempt, 0) :]
        self._read[attempt] = len(training.points)
        lost = training.unseen_from
        return new if lost is None else [point for point in new if point.step < lost]

    def phases(self, attempt: str) -> Sequence[TrainerPhase]:
        """Return the phase changes since the last call."""
        training = self._world.trainings.get(attempt)
        if training is None:
            return ()
        read = self._phases_read.get(attempt, 0)
        new = [phase for phase in training.phases[read:] if phase.since <= self._world.wall()]
        self._phases_read[attempt] = read + len(new)
        return new

    def members(self, attempt: str) -> Sequence[Rejoined]:
        """Return the generations that came together since the last call."""
        training = self._world.trainings.get(attempt)
        if training is None:
            return ()
        new = training.rejoined[self._rejoined_read.get(attempt, 0) :]
        self._rejoined_read[attempt] = len(training.rejoined)
        epoch = self._world.wall() - self._world.now
        return [Rejoined(generation=each.generation, step=each.step, at=epoch + each.at) for each in new]

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Inject faults into the attempt's trainer."""
        if training := self._world.trainings.get(attempt):
            training.inject(drills)
            self._world.timeline.disturb()


class SimulatedCheckpoints:
    """The checkpoint store. An examination takes virtual time, and is lost with the daemon process."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._began_at = world.now
        self._examining: dict[str, tuple[Checkpoint, float]] = {}

    def committed(self, run: str) -> Sequence[Checkpoint]:
        """Return the checkpoints of a run, oldest first."""
        return [saved.checkpoint for saved in self._world.checkpoints.values() if saved.checkpoint.run == run]

    def examine(self, checkpoint: Checkpoint) -> None:
        """Begin an examination, unless it is under way. It counts from the commit, as if it had begun then."""
        saved = self._world.checkpoints.get(checkpoint.path)
        ready = max(self._began_at, saved.committed_at if saved else 0.0) + self._world.costs.examine
        self._examining.setdefault(checkpoint.path, (checkpoint, ready))

    def written(self, checkpoint: Checkpoint) -> int:
        """Return when the checkpoint was committed, in virtual nanoseconds."""
        saved = self._world.checkpoints.get(checkpoint.path)
        return int(saved.committed_at * 1e9) if saved else 0

    def pin(self, checkpoint: Checkpoint, holder: str = "") -> None:
        """Do nothing: the simulated store prunes by age only."""

    def unpin(self, checkpoint: Checkpoint, holder: str) -> None:
        """Do nothing, as above."""

    def examined(self) -> Sequence[tuple[Checkpoint, str]]:
        """Return the examinations that ended since the last call, each with its problem."""
        ended = [path for path, (_, ready) in self._examining.items() if ready <= self._world.now]
        return [(self._examining.pop(path)[0], self._problem(path)) for path in ended]

    def _problem(self, path: str) -> str:
        saved = self._world.checkpoints.get(path)
        return saved.damage if saved else "it no longer exists"


class SimulatedInbox:
    """The inbox."""

    def __init__(self, world: World) -> None:
        self._world = world

    def requests(self) -> Sequence[Request]:
        """Return the waiting requests."""
        return list(self._world.inbox.values())

    def done(self, request: str) -> None:
        """Remove a request."""
        self._world.inbox.pop(request, None)


class SimulatedNotifier:
    """Collects alerts in the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sent: dict[str, float] = {}

    def send(self, alert: Alert) -> None:
        """Deliver an alert."""
        self._world.alerts.append((self._world.now, alert))
        self._sent[alert.id] = self._world.now + self._world.costs.deliver

    def delivered(self) -> Sequence[tuple[str, str]]:
        """Return the deliveries that ended since the last call."""
        arrived = [alert for alert, at in self._sent.items() if at <= self._world.now]
        for alert in arrived:
            del self._sent[alert]
        return [(alert, "") for alert in arrived]


class SimulatedBesideDaemon:
    """Evaluations beside the daemon."""

    def __init__(self, world: World) -> None:
        self._evaluations = world.evaluations

    def follow(self, wanted: EvaluationOrder | None) -> None:
        """Start what is wanted, and end what is not."""
        self._evaluations.beside = self._evaluations.only(self._evaluations.beside, wanted)

    def ended(self) -> Sequence[tuple[str, int]]:
        """Return the evaluation that ended by itself."""
        beside = self._evaluations.beside
        return [(beside.report.name, beside.report.code)] if beside and beside.report.code is not None else ()


def ports(world: World) -> Ports:
    """Return new ports for one daemon process. What the one before has started dies with it."""
    world.evaluations.kill(world.evaluations.beside)
    world.evaluations.beside = None
    return Ports(
        clock=SimulatedClock(world),
        scheduler=SimulatedScheduler(world),
        agents=SimulatedAgents(world),
        trainer=SimulatedTrainer(world),
        checkpoints=SimulatedCheckpoints(world),
        inbox=SimulatedInbox(world),
        notifier=SimulatedNotifier(world),
        evaluations=SimulatedBesideDaemon(world),
    )
