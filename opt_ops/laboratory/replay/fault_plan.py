"""The fault plan of one replay: taken from a record where it says enough, sampled by a seed where it does not.

The supervisor and the oracle meet the same plan. Faults are placed by steps: a stop strikes when its step is first
trained, however long that takes. So both meet the same stops for each day of work.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from opt_ops.laboratory.replay.scenario import InPlaceRecovery, Scenario, Stops
from opt_ops.laboratory.replay.trace import IncidentTrace, TracedIncident
from opt_ops.laboratory.simulated.hosts import ReplacementNode
from opt_ops.laboratory.simulated.training import Divergence

Kind = Literal["gpu", "host", "process", "hang", "planned"]

_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An interruption of training."""

    step: int
    kind: Kind
    label: str  # of the row in the record; empty: sampled
    replacements: tuple[tuple[ReplacementNode, ...], ...] = ()
    """For each lost host: the hosts that replace it, one after the other, until one is good."""
    launch_fails: int = 0  # number of launches afterwards that fail
    needs_human: bool = False
    # Of recovery in place alone:
    in_flight: float = 0.0  # share of the next step that is made, and lost
    standby: bool = True  # whether standby ranks are warm
    replacement_fails: bool = False
    pair: bool | None = None  # whether a lost host held the copies of another one


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A spike of the loss that recovers without action."""

    step: int
    height: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLoss:
    """The loss of the whole cluster."""

    step: int
    back: tuple[tuple[float, int], ...]
    bad: int
    names: tuple[str, ...]


@dataclass(slots=True)
class FaultPlan:
    """Everything that will go wrong, in the order of steps."""

    seed: int
    stops: list[Stop] = field(default_factory=list[Stop])
    divergences: list[Divergence] = field(default_factory=list[Divergence])
    spikes: list[Spike] = field(default_factory=list[Spike])
    slow: list[int] = field(default_factory=list[int])
    loss: ClusterLoss | None = None
    hosts_later: int = 0
    sampled: Counter[str] = field(default_factory=Counter[str])
    """What the record does not say, and how often it was sampled."""


class _Sampler:
    """The random numbers of one plan."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.random = random.Random(f"{scenario.name} {seed}")
        self.fault_plan = FaultPlan(seed=seed)
        self.steps = scenario.training.steps
        self.days = scenario.healthy_seconds / 86400.0
        self._first_later = scenario.cluster.nodes + scenario.cluster.spares + 1

    def name(self) -> str:
        """Return the name of a host that comes later, numbered as in `Physics.node_names`."""
        self.fault_plan.hosts_later += 1
        return f"n{self._first_later + self.fault_plan.hosts_later - 1:03d}"

    def moments(self, per_day: float, begin: float = 0.0, end: float = 1.0) -> list[int]:
        """Return the steps of a Poisson process between two shares of the work."""
        found: list[int] = []
        at = begin * self.days
        while per_day > 0:
            at += self.random.expovariate(per_day)
            if at >= end * self.days:
                break
            found.append(self.step(at / self.days))
        return found

    def step(self, share: float) -> int:
        """Return the step at a share of the work, but none of the first or last 50."""
        return min(max(int(share * self.steps), 50), self.steps - 50)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


def sample(scenario: Scenario, record: IncidentTrace | None, seed: int) -> FaultPlan:
    """Make the fault plan of one replay."""
    sampler = _Sampler(scenario, seed)
    fault_plan, training = sampler.fault_plan, scenario.training
    if scenario.stops is not None:
        _stops(sampler, scenario.stops, record.incidents if record else [])
    for each in scenario.divergences.at:
        _diverge(sampler, each.step)
    for incident in record.incidents if record else []:
        if incident.what == "divergence":
            fault_plan.sampled["step of a divergence"] += incident.step is None
            _diverge(sampler, incident.step or sampler.step(sampler.random.random()))
    if spikes := scenario.spikes:
        for step in sampler.moments(spikes.per_day.value):
            height, steps = sampler.random.uniform(*spikes.height), sampler.random.randint(*spikes.steps)
            fault_plan.spikes.append(Spike(step=step, height=height, steps=steps))
    if scenario.slow is not None:
        fault_plan.slow = sampler.moments(scenario.slow.per_day.value)
    if loss := scenario.loss:
        full, spares = scenario.cluster.nodes, scenario.cluster.spares
        back = (
            (loss.back_hours.value * _HOUR, loss.back_nodes),
            (loss.full_hours.value * _HOUR, full),
            (loss.spares_hours.value * _HOUR, full + spares),
        )
        names = tuple(sampler.name() for _ in range(loss.bad_nodes + full + spares))
        fault_plan.loss = ClusterLoss(step=int(loss.at * training.steps), back=back, bad=loss.bad_nodes, names=names)
    fault_plan.stops.sort(key=lambda stop: stop.step)
    if scenario.in_place is not None:
        _in_place(scenario, scenario.in_place, fault_plan)
    return fault_plan


def _in_place(scenario: Scenario, rules: InPlaceRecovery, fault_plan: FaultPlan) -> None:
    """Add what matters to recovery in place, from random numbers of its own: everything else stays as it is."""
    drawn = random.Random(f"{scenario.name} {fault_plan.seed} in place")
    for number, stop in enumerate(fault_plan.stops):
        in_flight, standby, fails, pair = (drawn.random() for _ in range(4))
        pairs = math.comb(len(stop.replacements), 2)
        fault_plan.stops[number] = replace(
            stop,
            in_flight=in_flight,
            standby=standby < rules.standby.value,
            replacement_fails=fails < rules.fails.value or stop.needs_human,
            pair=pair < 1.0 - (1.0 - rules.pair.value) ** pairs,
        )


def _diverge(sampler: _Sampler, step: int) -> None:
    rules = sampler.scenario.divergences
    sampler.fault_plan.divergences.append(
        Divergence(
            step=min(step, sampler.steps - 1),
            height=rules.height,
            steps=rules.steps,
            cured_below=sampler.random.uniform(*rules.cured_below),
            relative=True,
            rooted=int(rules.rooted_steps.value),
        )
    )


def _stops(sampler: _Sampler, rules: Stops, incidents: Sequence[TracedIncident]) -> None:
    known = [each for each in incidents if each.what == "stop"]
    steps = _placed(sampler, [each.step for each in known])
    covered = max(steps, default=0) / sampler.steps
    for incident, step in zip(known, steps, strict=True):
        sampler.fault_plan.sampled["step of a stop"] += incident.step is None
        sampler.fault_plan.sampled["what stopped it"] += 1
        _stop(sampler, rules, step, incident.label)
    rate = rules.per_day.value
    unlisted = max(0.0, rate - len(known) / (covered * sampler.days)) if covered else rate
    for step in (*sampler.moments(unlisted, 0.0, covered), *sampler.moments(rate, covered, 1.0)):
        sampler.fault_plan.sampled["a whole stop"] += bool(known)
        _stop(sampler, rules, step, "")


def _placed(sampler: _Sampler, steps: Sequence[int | None]) -> list[int]:
    """Return the steps of the rows in order. An unknown step is uniform between its known neighbours."""
    placed: list[int] = []
    for number, step in enumerate(steps):
        low = max([each for each in steps[:number] if each is not None], default=1)
        later = [each for each in steps[number:] if each is not None and each >= low]
        high = min(later, default=low)
        placed.append(step if step is not None else sampler.random.randint(low, max(low, high)))
    return sorted(min(max(step, 50), sampler.steps - 50) for step in placed)


def _stop(sampler: _Sampler, rules: Stops, step: int, label: str) -> None:
    kinds: tuple[Kind, ...] = ("gpu", "host", "process", "hang", "planned")
    weights = [getattr(rules, kind).value for kind in kinds]
    kind = sampler.random.choices(kinds, weights)[0]
    hosts = _hosts(sampler, rules) if kind in ("gpu", "host") else 0
    fails = 0
    while sampler.chance(rules.launch_fails.value) and fails < 5:
        fails += 1
    sampler.fault_plan.stops.append(
        Stop(
            step=step,
            kind=kind,
            label=label,
            replacements=tuple(_replacements(sampler) for _ in range(hosts)),
            launch_fails=fails,
            needs_human=kind != "planned" and sampler.chance(rules.needs_human.value),
        )
    )


def _hosts(sampler: _Sampler, rules: Stops) -> int:
    if sampler.chance(rules.five.value):
        return 5
    return 2 if sampler.chance(rules.more_than_one.value) else 1


def _replacements(sampler: _Sampler) -> tuple[ReplacementNode, ...]:
    repair = sampler.scenario.repair
    replacements: list[ReplacementNode] = []
    after, bad = 0.0, True
    while bad:
        hours = repair.median_hours.value * math.exp(sampler.random.gauss(0.0, repair.sigma.value))
        after, bad = after + hours * _HOUR, sampler.chance(repair.bad_again.value)
        replacements.append(ReplacementNode(name=sampler.name(), after=after, bad=bad))
    return tuple(replacements)
