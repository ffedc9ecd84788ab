"""What goes wrong in one replay: read from a record where it says so, drawn by a seed where it does not.

The same fate meets the supervisor and the oracle. It is laid out by steps: a stop strikes when its step is first
trained, however long that takes, so that both meet the same stops per running day.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from opt_ops.laboratory.replay.scenario import Scenario, Stops
from opt_ops.laboratory.replay.trace import Incident, Record
from opt_ops.laboratory.simulated.hosts import Arrival
from opt_ops.laboratory.simulated.training import Sickness

Kind = Literal["gpu", "host", "process", "hang", "planned"]

_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An interruption."""

    step: int
    kind: Kind
    label: str  # of the record's row; empty: drawn
    arrivals: tuple[tuple[Arrival, ...], ...] = ()
    """For each host that is lost: those that the provider sends, one after the other, until one is good."""
    launch_fails: int = 0  # of the launches that follow
    needs_human: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A spike that heals."""

    step: int
    height: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLoss:
    """The cluster is gone."""

    step: int
    back: tuple[tuple[float, int], ...]
    bad: int
    names: tuple[str, ...]


@dataclass(slots=True)
class Fate:
    """Everything that will happen, in the order of steps."""

    seed: int
    stops: list[Stop] = field(default_factory=list[Stop])
    sicknesses: list[Sickness] = field(default_factory=list[Sickness])
    spikes: list[Spike] = field(default_factory=list[Spike])
    slow: list[int] = field(default_factory=list[int])
    loss: ClusterLoss | None = None
    hosts_later: int = 0
    left_open: Counter[str] = field(default_factory=Counter[str])
    """What the record does not say, and was drawn."""


class _Draw:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.random = random.Random(f"{scenario.name} {seed}")
        self.fate = Fate(seed=seed)
        self.steps = scenario.training.steps
        self.days = scenario.healthy_seconds / 86400.0
        self._first_later = scenario.cluster.nodes + scenario.cluster.spares + 1

    def name(self) -> str:
        """Of a host that is not there yet; as `Physics.node_names` counts them."""
        self.fate.hosts_later += 1
        return f"n{self._first_later + self.fate.hosts_later - 1:03d}"

    def moments(self, per_day: float, begin: float = 0.0, end: float = 1.0) -> list[int]:
        """Steps of a Poisson process between two shares of the work."""
        found: list[int] = []
        at = begin * self.days
        while per_day > 0:
            at += self.random.expovariate(per_day)
            if at >= end * self.days:
                break
            found.append(self.step(at / self.days))
        return found

    def step(self, share: float) -> int:
        """The step at that share of the work, not among the very first and last."""
        return min(max(int(share * self.steps), 50), self.steps - 50)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


def draw(scenario: Scenario, record: Record | None, seed: int) -> Fate:
    """The fate of one replay."""
    drawn = _Draw(scenario, seed)
    fate, training = drawn.fate, scenario.training
    if scenario.stops is not None:
        _stops(drawn, scenario.stops, record.incidents if record else [])
    for each in scenario.divergences.at:
        _diverge(drawn, each.step)
    for incident in record.incidents if record else []:
        if incident.what == "divergence":
            fate.left_open["step of a divergence"] += incident.step is None
            _diverge(drawn, incident.step or drawn.step(drawn.random.random()))
    if spikes := scenario.spikes:
        for step in drawn.moments(spikes.per_day.value):
            height, steps = drawn.random.uniform(*spikes.height), drawn.random.randint(*spikes.steps)
            fate.spikes.append(Spike(step=step, height=height, steps=steps))
    if scenario.slow is not None:
        fate.slow = drawn.moments(scenario.slow.per_day.value)
    if loss := scenario.loss:
        full, spares = scenario.cluster.nodes, scenario.cluster.spares
        back = (
            (loss.back_hours.value * _HOUR, loss.back_nodes),
            (loss.full_hours.value * _HOUR, full),
            (loss.spares_hours.value * _HOUR, full + spares),
        )
        names = tuple(drawn.name() for _ in range(loss.bad_nodes + full + spares))
        fate.loss = ClusterLoss(step=int(loss.at * training.steps), back=back, bad=loss.bad_nodes, names=names)
    fate.stops.sort(key=lambda stop: stop.step)
    return fate


def _diverge(drawn: _Draw, step: int) -> None:
    rules = drawn.scenario.divergences
    drawn.fate.sicknesses.append(
        Sickness(
            step=min(step, drawn.steps - 1),
            height=rules.height,
            steps=rules.steps,
            cured_below=drawn.random.uniform(*rules.cured_below),
            relative=True,
            rooted=int(rules.rooted_steps.value),
        )
    )


def _stops(drawn: _Draw, rules: Stops, incidents: Sequence[Incident]) -> None:
    known = [each for each in incidents if each.what == "stop"]
    steps = _placed(drawn, [each.step for each in known])
    covered = max(steps, default=0) / drawn.steps
    for incident, step in zip(known, steps, strict=True):
        drawn.fate.left_open["step of a stop"] += incident.step is None
        drawn.fate.left_open["what stopped it"] += 1
        _stop(drawn, rules, step, incident.label)
    rate = rules.per_day.value
    unlisted = max(0.0, rate - len(known) / (covered * drawn.days)) if covered else rate
    for step in (*drawn.moments(unlisted, 0.0, covered), *drawn.moments(rate, covered, 1.0)):
        drawn.fate.left_open["a whole stop"] += bool(known)
        _stop(drawn, rules, step, "")


def _placed(drawn: _Draw, steps: Sequence[int | None]) -> list[int]:
    """The rows' steps in order; an unknown one evenly between those that are known before and after it."""
    placed: list[int] = []
    for number, step in enumerate(steps):
        low = max([each for each in steps[:number] if each is not None], default=1)
        later = [each for each in steps[number:] if each is not None and each >= low]
        high = min(later, default=low)
        placed.append(step if step is not None else drawn.random.randint(low, max(low, high)))
    return sorted(min(max(step, 50), drawn.steps - 50) for step in placed)


def _stop(drawn: _Draw, rules: Stops, step: int, label: str) -> None:
    kinds: tuple[Kind, ...] = ("gpu", "host", "process", "hang", "planned")
    weights = [getattr(rules, kind).value for kind in kinds]
    kind = drawn.random.choices(kinds, weights)[0]
    hosts = _hosts(drawn, rules) if kind in ("gpu", "host") else 0
    fails = 0
    while drawn.chance(rules.launch_fails.value) and fails < 5:
        fails += 1
    drawn.fate.stops.append(
        Stop(
            step=step,
            kind=kind,
            label=label,
            arrivals=tuple(_exchange(drawn) for _ in range(hosts)),
            launch_fails=fails,
            needs_human=kind != "planned" and drawn.chance(rules.needs_human.value),
        )
    )


def _hosts(drawn: _Draw, rules: Stops) -> int:
    if drawn.chance(rules.five.value):
        return 5
    return 2 if drawn.chance(rules.more_than_one.value) else 1


def _exchange(drawn: _Draw) -> tuple[Arrival, ...]:
    repair = drawn.scenario.repair
    arrivals: list[Arrival] = []
    after, bad = 0.0, True
    while bad:
        hours = repair.median_hours.value * math.exp(drawn.random.gauss(0.0, repair.sigma.value))
        after, bad = after + hours * _HOUR, drawn.chance(repair.bad_again.value)
        arrivals.append(Arrival(name=drawn.name(), after=after, bad=bad))
    return tuple(arrivals)
