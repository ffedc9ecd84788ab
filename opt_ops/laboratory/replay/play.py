"""One replay: a fault plan in a simulated cluster, and the real supervisor that meets it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from opt_ops import playbook_loader
from opt_ops.core.decide.policy import Policy
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Schedule, Severity
from opt_ops.laboratory.replay.fault_plan import FaultPlan, Stop
from opt_ops.laboratory.replay.scenario import Scenario
from opt_ops.laboratory.simulated import Physics, World, faults, run
from opt_ops.laboratory.simulated.costs import normal
from opt_ops.laboratory.simulated.drive import Pace
from opt_ops.laboratory.simulated.hosts import LoseCluster, LoseHosts
from opt_ops.laboratory.simulated.ports import ports
from opt_ops.laboratory.simulated.world import Planned, SimulatedFault
from opt_ops.supervise.executor import Site
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor

LINEAGE = "12"
_RECIPE = "opt-175b"
_SHM = Path("/dev/shm")  # noqa: S108  in memory: every journal line is synced, and nothing must outlive the process


@dataclass(frozen=True, slots=True)
class Played:
    """The world and the state after a replay."""

    world: World
    state: State
    halts: tuple[float, ...]
    """When the lineage halted, in virtual seconds."""


def policy_for(scenario: Scenario) -> Policy:
    """Return the policy of the shipped playbooks, with pages as the only alerts."""
    policy, _ = playbook_loader.load(playbook_loader.folder(), expected_gpus=scenario.cluster.gpus_per_node)
    policy = replace(policy, least_alert=Severity.PAGE, in_place=scenario.in_place is not None)
    return replace(policy, in_place_seconds=scenario.in_place.deadline.value) if scenario.in_place else policy


def play(
    scenario: Scenario,
    fault_plan: FaultPlan,
    tick_seconds: float = 1.0,
    folder: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Played:
    """Replay one fault plan.

    Args:
        scenario: The cluster and the training.
        fault_plan: What goes wrong.
        tick_seconds: Time between two ticks of the supervisor: the detection delay.
        folder: Folder for the journal; None: a temporary one.
        progress: Called with the share of steps that are trained.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(dir=_SHM if _SHM.is_dir() else None) as temporary:
            return play(scenario, fault_plan, tick_seconds, Path(temporary), progress)
    world = world_of(scenario, fault_plan)
    site = Site(folder=f"/sim/{LINEAGE}", trainer=("train",))
    identity = DaemonIdentity(host="replay", pid=1, last_liveness=None)
    supervisor = Supervisor(folder, ports(world), policy_for(scenario), site, identity)
    driven = _SupervisorAndOnCall(scenario, fault_plan, world, supervisor, progress)
    longest = 4 * scenario.healthy_seconds + 60 * 86400.0
    try:
        state = run(world, driven, longest, Pace(tick=tick_seconds, settle=3.0, stride=900.0, idle=60.0))
    finally:
        supervisor.close()
    return Played(world, state, tuple(driven.halts))


class _SupervisorAndOnCall:
    """The supervisor, and the operator who comes after a halt."""

    def __init__(
        self,
        scenario: Scenario,
        fault_plan: FaultPlan,
        world: World,
        supervisor: Supervisor,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._person = scenario.person
        self._seed = fault_plan.seed
        self._world = world
        self._supervisor = supervisor
        self._progress = progress
        self.halts: list[float] = []
        self._paged = False

    @property
    def state(self) -> State:
        """The state of the lineage. A halt is not its end while an operator is on the way."""
        state = self._supervisor.state
        coming = state.status is Status.HALTED and self._person.answers
        return replace(state, status=Status.RECOVERING) if coming and state.finished else state

    def tick(self) -> bool:
        """One tick of the supervisor. An operator whom it pages comes after a while."""
        changed = self._supervisor.tick()
        state = self._supervisor.state
        if state.status is not Status.HALTED:
            self._paged = False
        elif not self._paged:
            self._paged = True
            self.halts.append(self._world.now)
            if self._person.answers:
                self._send_operator()
        if self._progress is not None and state.attempt is not None and state.attempt.steps:
            self._progress((state.attempt.last_step or 0) / state.attempt.steps)
        return changed

    def _send_operator(self) -> None:
        number = len(self.halts)
        spread = self._person.reply_sigma.value * normal(self._seed, number, 77)
        hours = self._person.reply_median_hours.value * math.exp(spread)
        self._world.timeline.after(hours * 3600.0, _repair, self._world, number)


def _repair(world: World, number: int) -> None:
    """The operator repairs what no restart could cure, and resumes."""
    world.failing_launches = world.generations.failing = 0
    world.ask(faults.Ask(request=f"r-mended-{number}", verb="resume", arguments={"reason": "mended"}).as_request())


def world_of(scenario: Scenario, fault_plan: FaultPlan) -> World:
    """Return the simulated cluster with the fault plan in it."""
    cluster, training = scenario.cluster, scenario.training
    physics = Physics(
        seed=fault_plan.seed,
        nodes=cluster.nodes + cluster.spares + fault_plan.hosts_later,
        nodes_later=fault_plan.hosts_later,
        gpus_per_node=cluster.gpus_per_node,
        time_limit=cluster.time_limit_hours * 3600.0,
        steps=training.steps,
        step_seconds=training.step_seconds.value,
        full_nodes=cluster.nodes,
        save_every=scenario.save_every,
        evaluate_every=training.evaluate_every,
        keep=training.keep,
        schedule=Schedule(
            peak_lr=training.peak_lr,
            warmup_steps=training.warmup_steps,
            total_steps=training.steps,
            final_fraction=0.1,
        ),
    )
    in_place = scenario.in_place.costs() if scenario.in_place else None
    costs = replace(scenario.physical.costs(), evaluation=training.evaluation_seconds.value, in_place=in_place)
    start = {
        "lineage": LINEAGE,
        "recipe": _RECIPE,
        "settings": [],
        "data": [],
        "tokenizer": None,
        "shape": {
            "nodes": cluster.nodes,
            "spares": cluster.spares,
            "ranks_per_node": cluster.gpus_per_node,
            "min_nodes": cluster.min_nodes,
        },
    }
    plan = [Planned(fault=faults.Ask(request="r-start", verb="start", arguments=start), at=0.0)]
    plan += [Planned(fault=fault, step=step) for step, fault in _faults(scenario, fault_plan)]
    return World(physics, costs, plan)


def _faults(scenario: Scenario, fault_plan: FaultPlan) -> list[tuple[int, SimulatedFault]]:
    found: list[tuple[int, SimulatedFault]] = []
    for number, stop in enumerate(fault_plan.stops):
        if stop.needs_human:
            found.append((stop.step, faults.FailLaunches(times=10_000)))
        elif stop.launch_fails:
            found.append((stop.step, faults.FailLaunches(times=stop.launch_fails)))
        if stop.replacement_fails:
            found.append((stop.step, faults.FailReplacements(times=10_000 if stop.needs_human else 1)))
        if not stop.standby:
            found.append((stop.step - 1, faults.CoolStandbys()))  # the supervisor has read that when it decides
        fault = _fault(stop, number)
        if stop.in_flight:
            fault = faults.Later(fault=fault, seconds=stop.in_flight * scenario.training.step_seconds.value)
        found.append((stop.step, fault))
    found += [(1, faults.Diverge(divergence=divergence)) for divergence in fault_plan.divergences]
    found += [(1, faults.Bump(step=each.step, height=each.height, steps=each.steps)) for each in fault_plan.spikes]
    if scenario.slow is not None:
        factor = scenario.slow.factor.value
        found += [(step, faults.SlowDown(factor=factor, seconds=1e9)) for step in fault_plan.slow]
    if loss := fault_plan.loss:
        found.append((loss.step, LoseCluster(back=loss.back, bad=loss.bad, names=loss.names)))
    return found


def _fault(stop: Stop, number: int) -> SimulatedFault:
    match stop.kind:
        case "gpu" | "host":
            return LoseHosts(replacements=stop.replacements, silent=stop.kind == "host", pair=stop.pair)
        case "process":
            return faults.KillRank(signal=None, code=1)
        case "hang":
            return faults.Hang(rank=number % 8)
        case "planned":
            arguments = {"reason": "a planned change", "settings": [f"note={number}"]}
            return faults.Ask(request=f"r-planned-{number}", verb="change", arguments=arguments)
