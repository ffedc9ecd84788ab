"""The simulated world: its clock, and how nodes, agents, training and checkpoints affect each other.

Its state is plain data. It holds nothing of a supervisor: one may die at any moment, and another may take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from opt_ops.core.values import Checkpoint
from opt_ops.laboratory.simulated.agents import NodeAgents, NodeRanks
from opt_ops.laboratory.simulated.cluster import Cluster
from opt_ops.laboratory.simulated.costs import Costs, Physics, uniform
from opt_ops.laboratory.simulated.in_place import Generations
from opt_ops.laboratory.simulated.timeline import Timeline
from opt_ops.laboratory.simulated.training import FOREVER, Divergence, LossCurve, StoredCheckpoint, Training
from opt_ops.ports import Alert, Launch, Request, TrainerConfig

EPOCH = 1_636_588_800.0  # 11 November 2021, 00:00 UTC, when the published record of OPT-175B begins

_THINNING = 16  # saves between two prunings of checkpoints

_CAPABILITIES = ("members", "peer_copies", "warm_start")

_DAMAGED, _NOT_FINITE, _CORRUPT, _PEER_CORRUPT = 65, 82, 85, 87  # the trainer's exit codes (docs/formats.md)


class SimulatedFault(Protocol):
    """A fault of a simulated world."""

    def strike(self, world: World) -> None:
        """Make the fault happen now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A fault that strikes at a time (virtual seconds) or once, when a step is first trained."""

    fault: SimulatedFault
    at: float | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the first attempt that comes to `step` ends there, instead of going on or leaving with code 0.

    The attempt saves that step. Of its checkpoint, `damage` says what differs from the manifest.
    """

    step: int
    code: int | None = 0  # of every rank if it is 0, else of one rank, whose peers die of it
    signal: int | None = None  # that kills one rank
    node_down: bool = False
    committed: bool = True
    damage: str = ""


class World:
    """A cluster in virtual time."""

    def __init__(
        self,
        physics: Physics | None = None,
        costs: Costs | None = None,
        plan: Sequence[Planned] = (),
        name: str = "sim",
    ) -> None:
        """`name` is part of the GPUs' UUIDs, so that they differ from those of other worlds."""
        self.physics = physics or Physics()
        self.costs = costs or Costs()
        self.timeline = Timeline()
        self.skew = 0.0  # of the daemon's wall clock, seconds
        self.cluster = Cluster(self.physics, self.costs, self.timeline, name)
        self.agents = NodeAgents(self.cluster, self.costs, self.timeline, self.wall)
        self.evaluations = self.agents.evaluations
        self.curve = LossCurve()
        self.trainings: dict[str, Training] = {}
        self._active: list[Training] = []  # trainings that make steps
        self.checkpoints: dict[str, StoredCheckpoint] = {}
        self.damage_next: list[str] = []
        self.failing_launches = 0
        """Number of the next launches that fail; see `faults.FailLaunches`."""
        self.ending: Ending | None = None
        self.inbox: dict[str, Request] = {}
        self.asked: list[str] = []
        """Every request of an operator so far."""
        self.alerts: list[tuple[float, Alert]] = []
        self.evaluations.ask, self.evaluations.exists = self._evaluated, self._has_checkpoint
        self.agents.started = self._rank_started
        self.agents.fell = self._rank_fell
        self.agents.survives = self._survives
        self.generations = Generations(self.costs, self.timeline, self.agents)
        self.generations.training = self.trainings.__getitem__
        self.generations.went_on = self._went_on
        self.agents.joining = self.generations.joining
        self.agents.peers_lost_since = self.generations.peers_lost_since
        self.agents.stuck = self._stopped
        self.agents.save_asked = self._save_asked
        self.agents.dump_asked = self._dump_asked
        self._steps: dict[int, list[SimulatedFault]] = {}
        self._choices = 0
        for planned in plan:
            self.plan(planned)

    # ---- time

    @property
    def now(self) -> float:
        """Virtual seconds since the world began."""
        return self.timeline.now

    def wall(self) -> float:
        """Seconds since the epoch by the nodes' clocks."""
        return EPOCH + self.timeline.now

    def advance(self, to: float, pausing: bool = False) -> None:
        """Let time pass until `to`; with `pausing`, only until an event to which a supervisor may have to react."""
        before = self.timeline.disturbed_at
        while True:
            until = min(self.timeline.next_at, to)
            if self._train(until):
                pass  # a step had consequences that may be due before `until`
            elif self.timeline.next_at <= to:
                self.timeline.pop()
            else:
                self.timeline.now = max(self.timeline.now, to)
                return
            if pausing and self.timeline.disturbed_at > before:
                return

    @property
    def calm(self) -> float:
        """Seconds of training without an event; 0 while nothing is trained."""
        training = any(each.next_at < FOREVER for each in self._active)
        return self.now - self.timeline.disturbed_at if training and not self.inbox else 0.0

    def plan(self, planned: Planned) -> None:
        """Schedule a fault."""
        if planned.step is not None:
            self._steps.setdefault(planned.step, []).append(planned.fault)
        else:
            self.timeline.at(planned.at or 0.0, self.strike, planned.fault)

    def strike(self, fault: SimulatedFault) -> None:
        """Let a fault strike now."""
        self.timeline.disturb()
        fault.strike(self)

    def ask(self, request: Request) -> None:
        """Put a request of an operator into the inbox."""
        self.inbox[request.request] = request
        self.asked.append(request.request)
        self.timeline.disturb()

    def _evaluated(self, request: Request) -> None:
        """An evaluation leaves its results: the same file for the same ones."""
        self.inbox[request.request] = request
        self.timeline.disturb()

    def _has_checkpoint(self, name: str) -> bool:
        run, _, step = name.partition("/")
        known = (each.checkpoint for each in self.checkpoints.values())
        return any((each.run, each.step) == (run, int(step)) for each in known)

    def choose(self, names: Sequence[str]) -> str:
        """Choose one of the names, by the seed and the number of choices before."""
        self._choices += 1
        return names[int(uniform(self.physics.seed, self._choices, 3) * len(names))]

    # ---- what is running

    @property
    def running(self) -> Training | None:
        """The training that was started last, if one of its ranks is alive."""
        newest = next(reversed(self.trainings.values()), None)
        return newest if newest is not None and self.agents.running(newest.launch.attempt) else None

    def alive(self) -> dict[str, set[str]]:
        """Return the attempts with living ranks, each with the nodes of those ranks."""
        found: dict[str, set[str]] = {}
        for attempt in self.agents.parts:
            if parts := self.agents.running(attempt):
                found[attempt] = {part.node for part in parts}
        return found

    # ---- training

    def _train(self, until: float) -> bool:
        """Make the steps that end by `until`. Returns early, with True, when one has consequences."""
        self._active = [training for training in self._active if training.next_at < FOREVER]
        for training in self._active:
            while training.next_at <= until:
                if self._step(training):
                    return True
        return False

    def _step(self, training: Training) -> bool:
        self.timeline.now = max(self.timeline.now, training.next_at)
        ends = self.ending is not None and training.step + 1 == self.ending.step
        training.save_asked = training.save_asked or ends
        saves = training.make_step()
        if ends:
            training.stall()
        if saves:
            # The checkpoint is copied aside at once, and written in the background.
            save = (training.step, training.divergence, training.generation)
            self.timeline.after(self.costs.commit, self._commit, training, *save)
        faults = self._steps.pop(training.step, ())
        for fault in faults:
            self.strike(fault)
        if not training.points[-1].finite:
            self.agents.finish(training.launch.attempt, _NOT_FINITE)
        for rank in training.corrupt:
            self.agents.kill(training.launch.attempt, rank, _CORRUPT, None)
            self.agents.finish(training.launch.attempt, _PEER_CORRUPT)
        if training.troubled:
            self.timeline.disturb()
        return saves or bool(faults) or training.troubled or training.next_at == FOREVER

    def _rank_started(self, launch: Launch, node: str) -> None:
        training = self.trainings.get(launch.attempt)
        if training is None:
            training = Training(launch, self.physics, self.costs, self.curve, EPOCH)
            self.trainings[launch.attempt] = training
            training.enter("start", self.now)
        slowness = self.cluster.nodes[node].slowness
        if slowness > 1.0:
            training.slow[node] = slowness
        self.timeline.disturb()
        if len(self.agents.parts[launch.attempt]) == len(launch.nodes):
            self.timeline.after(self.costs.startup, self._configure, training)

    def _configure(self, training: Training) -> None:
        if training.over:
            return
        physics = self.physics
        training.config = TrainerConfig(
            steps=physics.steps,
            schedule=physics.schedule,
            optimizer=physics.optimizer,
            versions={"simulated": "1"},
            layout={"nodes": len(training.launch.nodes)},
            capabilities=_CAPABILITIES if self.costs.in_place else (),
        )
        self.timeline.after(self.costs.load if training.command.resume else 0.0, self._begin, training)

    def _begin(self, training: Training) -> None:
        if training.over:
            return
        self.timeline.disturb()
        path = training.command.resume
        start = self.checkpoints.get(path) if path else None
        if path and (start is None or start.damage):
            self.agents.finish(training.launch.attempt, _DAMAGED)
            return
        if self.failing_launches > 0:
            self.failing_launches -= 1
            rank = int(self.choose([str(part.ranks[0]) for part in self.agents.running(training.launch.attempt)]))
            self.agents.kill(training.launch.attempt, rank, 1, None)
            return
        self.generations.failing = 0  # those that would have failed at this stop do not take place any more
        training.begin(self.now, start)
        self._active.append(training)

    def _rank_fell(self, attempt: str, node: str) -> None:
        training = self.trainings[attempt]
        if not self._survives(attempt):
            self.hang(attempt, None)
        elif node in training.launch.nodes:  # else it has been replaced, and ends where it was
            training.stall()
            training.over = True
            self.generations.died(attempt, host_lost=not self.cluster.nodes[node].up)

    def _survives(self, attempt: str) -> bool:
        """Whether ranks outlive the death of another one: not before their first step, when no copy exists."""
        return self.costs.in_place is not None and bool(self.trainings[attempt].points)

    def _went_on(self, training: Training, launch: Launch) -> None:
        slow = {node: self.cluster.nodes[node].slowness for node in launch.nodes}
        training.go_on(self.now, launch, slow)
        if training not in self._active:
            self._active.append(training)
        self.failing_launches = 0  # those that would have followed this stop do not take place
        self.timeline.disturb()

    def _stopped(self, attempt: str, rank: int) -> None:
        self.hang(attempt, rank)
        self.trainings[attempt].deaf = True

    def hang(self, attempt: str, rank: int | None) -> None:
        """Stop all steps of an attempt, with all processes alive. `rank` is the one that the others wait for."""
        training = self.trainings[attempt]
        training.stall()
        training.over = True
        training.stuck_rank = rank

    def _save_asked(self, attempt: str) -> None:
        self.trainings[attempt].save_asked = True

    def _dump_asked(self, part: NodeRanks, dump: str) -> None:
        training = self.trainings[part.attempt]
        taken = training.stacks.setdefault(dump, {})
        for rank in part.alive:
            if rank != training.stuck_rank:
                taken[rank] = _stack("distributed_c10d.py", "all_reduce")
            elif not training.deaf:
                taken[rank] = _stack("data.py", "load_batch")

    def _commit(self, training: Training, step: int, divergence: Divergence | None, generation: int) -> None:
        last = step == self.physics.steps
        if self.ending is not None and step == self.ending.step:
            ending, self.ending = self.ending, None
            self._end(training, ending, divergence)
            return
        if training.over and not (last and self.agents.running(training.launch.attempt)):
            return  # torn: the writers died
        if generation != training.generation:
            return  # given up: the writers have new groups
        self._store(training, step, divergence, self.damage_next.pop(0) if self.damage_next else "")
        if last:
            self.timeline.disturb()
            self.agents.finish(training.launch.attempt, 0)

    def _store(self, training: Training, step: int, divergence: Divergence | None, damage: str) -> None:
        path = f"{training.command.folder}/step-{step:08d}"
        known = self.checkpoints.get(path)
        if known is None or known.damage:  # a trainer replaces a damaged one
            checkpoint = Checkpoint(run=training.run, step=step, path=path)
            self.checkpoints[path] = StoredCheckpoint(checkpoint, divergence, damage, self.now, training.lr_scale(step))
            self._thin(training.run, step)

    def _end(self, training: Training, ending: Ending, divergence: Divergence | None) -> None:
        attempt = training.launch.attempt
        if ending.committed:
            self._store(training, ending.step, divergence, ending.damage)
        self.timeline.disturb()
        if ending.node_down:
            self.cluster.break_down(training.launch.nodes[-1])
        elif ending.code == 0 and ending.signal is None:
            self.agents.finish(attempt, 0)
        else:
            code = None if ending.signal is not None else ending.code
            self.agents.kill(attempt, training.launch.ranks_per_node, code, ending.signal)

    def _thin(self, run: str, newest: int) -> None:
        if newest // self.physics.save_every % _THINNING:
            return
        for path, saved in list(self.checkpoints.items()):
            step = saved.checkpoint.step
            spacing = max((each for age, each in self.physics.keep if newest - step > age), default=1)
            if saved.checkpoint.run == run and step % spacing:
                del self.checkpoints[path]


def _stack(file: str, function: str) -> str:
    """A stack in the form of faulthandler."""
    return f'Current thread 0x00007f (most recent call first):\n  File "/trainer/{file}", line 88 in {function}\n'
