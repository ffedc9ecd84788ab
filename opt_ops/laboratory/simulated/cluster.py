"""The nodes of the simulated cluster, and the scheduler that gives them to jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opt_ops.core.health import Gpu, Xid
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import Refused, SchedulerUnavailable
from opt_ops.laboratory.simulated.costs import Costs, Physics
from opt_ops.laboratory.simulated.timeline import Timeline
from opt_ops.ports import JobState


@dataclass(slots=True)
class SimulatedNode:
    """A host with its GPUs."""

    name: str
    host: str
    gpus: tuple[Gpu, ...]
    xids: tuple[Xid, ...] = ()
    up: bool = True
    given_up: bool = False  # whether the scheduler has marked it as down
    drained: str = ""
    reachable: bool = True  # False: heartbeats and reports do not arrive, and orders do not reach it
    slowness: float = 1.0  # factor on the time of its ranks
    job: str | None = None  # the job that holds it


@dataclass(slots=True)
class Job:
    """A submitted job."""

    number: str
    allocation: str
    wanted: int
    exclude: tuple[str, ...]
    submitted_at: float
    status: AllocationStatus = AllocationStatus.QUEUED
    nodes: tuple[str, ...] = ()
    ends_at: float | None = None
    warned: bool = False
    reason: str = ""


@dataclass(slots=True)
class SchedulerConditions:
    """How the scheduler fails."""

    away_until: float = 0.0
    no_nodes_until: float = 0.0
    lost_answers: list[bool] = field(default_factory=list[bool])
    """Answers to the next submissions that are lost. True: the job exists nevertheless."""


class Cluster:
    """Nodes and jobs. `given` is called for a job that gets nodes, `taken` for a node that a job loses."""

    def __init__(self, physics: Physics, costs: Costs, timeline: Timeline, prefix: str) -> None:
        self._physics = physics
        self._costs = costs
        self._timeline = timeline
        self.nodes = {
            name: SimulatedNode(
                name=name,
                host=f"10.0.{number // 250}.{number % 250}",
                gpus=tuple(_gpu(prefix, name, index) for index in range(physics.gpus_per_node)),
            )
            for number, name in enumerate(physics.node_names, 1)
        }
        for name in physics.node_names[physics.nodes - physics.nodes_later :]:
            self.nodes[name].up = False
        self.jobs: dict[str, Job] = {}
        self.conditions = SchedulerConditions()
        self.drains: list[tuple[str, str]] = []
        self.given: Callable[[Job], None]
        self.taken: Callable[[str], None]

    # ---- what the scheduler's commands do

    def submit(self, allocation: str, nodes: int, exclude: Sequence[str]) -> str:
        """Accept a job. Returns its number.

        Raises:
            Refused: more nodes are wanted than the cluster has.
            SchedulerUnavailable: no answer; the job may exist.
        """
        self.check_answers()
        accepted = self.conditions.lost_answers.pop(0) if self.conditions.lost_answers else None
        if accepted is False:
            raise SchedulerUnavailable("the submission did not reach the scheduler")
        possible = len(self.nodes.keys() - set(exclude))
        if nodes > possible:
            raise Refused(f"{nodes} nodes wanted, {possible} exist: the node configuration is not available")
        number = str(1000 + len(self.jobs))
        self.jobs[number] = Job(number, allocation, nodes, tuple(exclude), self._timeline.now, reason="Priority")
        self._timeline.after(self._costs.queue, self.give)
        if accepted:
            raise SchedulerUnavailable("the scheduler's answer was lost")
        return number

    def cancel(self, number: str) -> None:
        """Cancel a job: it ends soon."""
        self.check_answers()
        job = self.jobs[number]
        job.warned = True
        self._timeline.after(self._costs.cancel, self.end, number, "CANCELLED")

    def drain(self, node: str, reason: str) -> None:
        """Drain a node.

        Raises:
            Refused: it is not permitted here, or there is no such node.
        """
        self.check_answers()
        if not self._physics.can_drain:
            raise Refused(f"not permitted to drain {node}")
        if node not in self.nodes:
            raise Refused(f"invalid node name specified: {node}")
        self.nodes[node].drained = reason
        self.drains.append((node, reason))

    def remove_node(self, number: str, name: str) -> None:
        """Remove a node from a job.

        Raises:
            Refused: it is the first node, where the job's script runs.
        """
        self.check_answers()
        if self.nodes[name].job != number:
            return
        if self.jobs[number].nodes[0] == name:
            raise Refused(f"job {number} needs its node {name}: Invalid node name specified")
        self.taken(name)
        self._leave_job(name)
        self._timeline.disturb()

    def state(self, number: str) -> JobState:
        """Return the state of a job, as squeue would."""
        self.check_answers()
        job = self.jobs[number]
        unfit: dict[str, str] = {}
        for name in job.nodes:
            node = self.nodes[name]
            if node.given_up:
                unfit[name] = "down: not responding"
            elif node.drained:
                unfit[name] = f"drained: {node.drained}"
        return JobState(job.status, job.nodes, job.reason, unfit, job.ends_at)

    def check_answers(self) -> None:
        """Check that the scheduler answers.

        Raises:
            SchedulerUnavailable: it does not.
        """
        if self._timeline.now < self.conditions.away_until:
            raise SchedulerUnavailable("slurm_load_jobs error: Unable to contact slurm controller")

    # ---- what happens by itself

    @property
    def live(self) -> list[Job]:
        """The queued and running jobs, oldest first."""
        return [job for job in self.jobs.values() if job.status is not AllocationStatus.ENDED]

    def give(self) -> None:
        """Give free nodes to jobs that have waited long enough, first come, first served."""
        now = self._timeline.now
        if now < self.conditions.no_nodes_until:
            return
        for job in self.live:
            if job.status is not AllocationStatus.QUEUED or now < job.submitted_at + self._costs.queue:
                continue
            excluded = set(job.exclude)
            free = [
                name
                for name, node in self.nodes.items()
                if node.job is None and node.up and not node.drained and name not in excluded
            ]
            if len(free) < job.wanted:
                job.reason = "Resources"
                continue
            job.status, job.nodes, job.reason = AllocationStatus.RUNNING, tuple(free[: job.wanted]), ""
            job.ends_at = now + self._physics.time_limit
            for name in job.nodes:
                self.nodes[name].job = job.number
            self._timeline.at(job.ends_at - self._costs.warning, self._warn, job.number)
            self._timeline.at(job.ends_at, self.end, job.number, "TIMEOUT")
            self._timeline.disturb()
            self.given(job)

    def end(self, number: str, reason: str) -> None:
        """End a job, and everything that runs in it."""
        job = self.jobs[number]
        if job.status is AllocationStatus.ENDED:
            return
        held = job.nodes
        job.status, job.reason, job.nodes = AllocationStatus.ENDED, reason, ()
        for name in held:
            if self.nodes[name].job == number:
                self.taken(name)
                self.nodes[name].job = None
        self._timeline.disturb()
        self.give()

    def break_down(self, name: str) -> None:
        """Let a node crash. The scheduler marks it as down when it has not answered for a while."""
        node = self.nodes[name]
        if not node.up:
            return
        node.up = False
        self.taken(name)
        self._timeline.after(self._costs.node_timeout, self._give_up, name)
        self._timeline.disturb()

    def take_away(self, name: str) -> None:
        """Remove a node from the cluster, and from its job."""
        self.break_down(name)
        if self.nodes[name].job is not None:
            self._leave_job(name)

    def come_back(self, name: str) -> None:
        """Let a node return, repaired and without a job: what ran on it does not return."""
        node = self.nodes[name]
        if node.job is not None and not node.up:
            self._leave_job(name)
        node.up, node.reachable, node.given_up, node.drained, node.slowness = True, True, False, "", 1.0
        node.xids, node.gpus = (
            (),
            tuple(Gpu(index=g.index, uuid=g.uuid, serial=g.serial, name=g.name) for g in node.gpus),
        )
        self._timeline.disturb()
        self.give()

    def _give_up(self, name: str) -> None:
        node = self.nodes[name]
        if node.up:
            return
        node.given_up = True
        job = self.jobs.get(node.job or "")
        if job is not None and not any(self.nodes[other].up for other in job.nodes):
            self.end(job.number, "NODE_FAIL")
        self._timeline.disturb()

    def _leave_job(self, name: str) -> None:
        node = self.nodes[name]
        job = self.jobs[node.job or ""]
        node.job = None
        job.nodes = tuple(other for other in job.nodes if other != name)
        if not job.nodes:
            self.end(job.number, "NODE_FAIL")

    def _warn(self, number: str) -> None:
        self.jobs[number].warned = True
        self._timeline.disturb()


def _gpu(prefix: str, node: str, index: int) -> Gpu:
    name = f"{prefix}-{node}-{index}"
    return Gpu(
        index=index,
        uuid=f"GPU-{name}",
        serial=f"S-{name}",
        name="simulated",
        error=None,
        ecc_uncorrected=0,
        remap_pending=False,
        remap_failed=False,
        recovery_action="none",
    )
