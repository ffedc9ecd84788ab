"""Measures a replay: goodput, lost time by cause, the cost of each incident, and the time without an operator.

Goodput is kept steps × healthy step time, scheduled evaluation included, ÷ wall clock. `share of ideal` counts no
evaluation. ETTR is the real time of kept steps ÷ wall clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from opt_ops.core.failures.classes import Domain, FailureClass, row
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action, Severity
from opt_ops.laboratory.replay.fault_plan import FaultPlan
from opt_ops.laboratory.replay.oracle import Oracle
from opt_ops.laboratory.replay.play import Played
from opt_ops.laboratory.replay.scenario import Scenario
from opt_ops.laboratory.simulated.training import Rejoined, Training
from opt_ops.laboratory.simulated.world import EPOCH, World

DAY = 86400.0
_OF_HARDWARE = (Domain.HARDWARE, Domain.PROCESS)  # what a simulated machine's failure looks like


@dataclass(slots=True)
class ReplayResult:
    """The figures of one replay. Times in seconds."""

    seed: int
    status: str
    why: str
    wall: float
    steps: int
    goodput: float
    share_of_ideal: float
    ettr: float
    oracle_goodput: float | None
    stops: int
    incidents: list[dict[str, Any]]
    pages: list[tuple[float, str]]
    longest_hands_off: float
    lost: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds by cause: downtime and discarded steps by the kind of incident, saves, fewer or slow nodes."""
    hardware_stop: float | None = None  # mean seconds down and repeated of a stop, if no operator was waited for
    divergence: float | None = None  # the same
    person: float = 0.0  # seconds of downtime spent waiting for an operator
    in_place_stop: float | None = None  # `hardware_stop` of those that were recovered in place alone
    in_place: int = 0  # replacements of ranks while the others kept running
    fell_back: int = 0  # incidents in which that was tried in vain

    @property
    def share_of_oracle(self) -> float | None:
        """Goodput ÷ the goodput of the oracle with the same faults."""
        return self.goodput / self.oracle_goodput if self.oracle_goodput else None

    def plain(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {**asdict(self), "share_of_oracle": self.share_of_oracle}


def measure(scenario: Scenario, fault_plan: FaultPlan, played: Played) -> ReplayResult:
    """Measure a replay that has ended."""
    world, state = played.world, played.state
    wall = state.since - EPOCH if state.ended else world.now
    kept, lost = _account(scenario, list(world.trainings.values()), state)
    ideal = kept.steps * scenario.training.step_seconds.value
    healthy = scenario.healthy_seconds * kept.steps / scenario.training.steps
    completed = state.status == "COMPLETED"
    oracle = scenario.healthy_seconds / Oracle(scenario, fault_plan).seconds if completed else None
    pages = [(at, alert.title) for at, alert in world.alerts if alert.severity is Severity.PAGE]
    replaced = _replaced(world, state)
    costs = [_cost(scenario, each, played.halts, replaced.get(each.name)) for each in state.incidents.values()]
    alone = [each for each in costs if each["cost"] and not each["waited_for_person"]]
    hardware = [each for each in alone if row(each["kind"]).domain in _OF_HARDWARE]
    return ReplayResult(
        seed=fault_plan.seed,
        status=str(state.status),
        why=state.why,
        wall=wall,
        steps=kept.steps,
        goodput=healthy / wall,
        share_of_ideal=ideal / wall,
        ettr=kept.seconds / wall,
        oracle_goodput=oracle,
        stops=len(fault_plan.stops),
        incidents=costs,
        pages=pages,
        longest_hands_off=_longest(pages, wall),
        lost={kind: seconds for kind, seconds in sorted(lost.items(), key=lambda pair: -pair[1]) if seconds > 1.0},
        hardware_stop=mean_stop(hardware),
        in_place_stop=mean_stop([each for each in hardware if each["generation"] is not None]),
        divergence=mean_stop([each for each in alone if row(each["kind"]).domain is Domain.LOSS]),
        person=sum(answered - at for at, answered in _answers(played)),
        in_place=sum(len(training.rejoined) for training in world.trainings.values()),
        fell_back=sum(incident.fell_back is not None for incident in state.incidents.values()),
    )


def _answers(played: Played) -> Iterator[tuple[float, float]]:
    """Yield the time of each halt, and the time at which training continued."""
    first = [t.points[0].ts - EPOCH for t in played.world.trainings.values() if t.points]
    for at in played.halts:
        yield at, min((began for began in first if began > at), default=at)


def _replaced(world: World, state: State) -> dict[str, Rejoined]:
    """The replacements that came together, by incident."""
    found: dict[str, Rejoined] = {}
    for attempt in state.attempts.values():
        training = world.trainings.get(attempt.name)
        incidents = {members.generation: members.incident for members in attempt.members}
        for each in training.rejoined if training else ():
            if (name := incidents.get(each.generation)) is not None:
                found[name] = each
    return found


def _cost(scenario: Scenario, incident: Incident, halts: Sequence[float], replaced: Rejoined | None) -> dict[str, Any]:
    decision, at = incident.decision, incident.at - EPOCH
    down, repeated = incident.seconds_down or 0.0, incident.steps_lost or 0
    step = scenario.training.step_seconds.value  # `seconds_down` includes the first step, which may be work
    cost = max(0.0, down + (repeated - 1) * step)
    if replaced is not None:  # with the part of the step in flight, which is before the loss
        cost = replaced.at - replaced.stood_since
    return {
        "incident": incident.name,
        "kind": incident.kind,
        "cause": incident.cause,
        "at": at,
        "seen_after": incident.opened_at - incident.at,
        "step_failed": incident.step_failed,
        "step_resumed": incident.step_resumed,
        "attempt": incident.attempt,
        "action": str(decision.action) if decision else None,
        "playbook": decision.playbook if decision else None,
        "rung": decision.rung + 1 if decision else None,
        "lr_factor": decision.lr_factor if decision else None,
        "steps_lost": repeated,
        "seconds_down": down,
        "cost": cost,
        "generation": replaced.generation if replaced else None,
        "fell_back": incident.fell_back,
        "waited_for_person": any(at <= halt <= at + down for halt in halts),
        "proven": incident.proven,
    }


@dataclass(slots=True)
class _Kept:
    steps: int = 0
    seconds: float = 0.0


def _account(scenario: Scenario, trainings: Sequence[Training], state: State) -> tuple[_Kept, dict[str, float]]:
    """Return the kept steps, and the lost seconds by cause."""
    usual = scenario.training.step_seconds.value
    copy = scenario.in_place.copy_.value if scenario.in_place else 0.0
    lost: defaultdict[str, float] = defaultdict(float)
    kept = _Kept()
    start = 0.0
    before: Training | None = None
    stepped = [training for training in trainings if training.points]
    resumes = [training.points[0].step for training in stepped]
    for number, training in enumerate(stepped):
        why = _why(state, before)
        # A later attempt discards the steps from its own first step on.
        until = min(resumes[number + 1 :], default=training.points[-1].step + 1)
        lost[f"downtime: {why}"] += training.points[0].ts - EPOCH - training.points[0].step_seconds - start
        for each in training.rejoined:
            lost[f"in place: {_why_replaced(state, training, each.generation)}"] += each.at - each.stood_since
        again = _why(state, training)
        for point in training.points:
            if point.step < until:
                kept.steps += 1
                kept.seconds += point.step_seconds
                lost["saves"] += point.save_seconds
                lost["copies"] += copy
                lost["fewer or slow nodes"] += max(0.0, point.step_seconds - point.save_seconds - copy - usual)
            else:
                lost[f"repeated: {again}"] += point.step_seconds
        start, before = training.points[-1].ts - EPOCH, training
    return kept, lost


def _why(state: State, ended: Training | None) -> str:
    if ended is None:
        return "start"
    acted = (i for i in state.incidents.values() if i.attempt == ended.launch.attempt and i.acted_on)
    hit = [i for i in acted if i.decision is not None and i.decision.action is not Action.REPLACE_RANKS]
    return hit[0].kind if hit else "end"


def _why_replaced(state: State, training: Training, generation: int) -> str:
    attempt = state.attempts[training.launch.attempt]
    names = (members.incident for members in attempt.members if members.generation == generation)
    incident = state.incidents.get(next(names, None) or "")
    return incident.kind if incident else FailureClass.UNKNOWN


def _longest(pages: Sequence[tuple[float, str]], wall: float) -> float:
    moments = [0.0, *(at for at, _ in pages), wall]
    return max(later - earlier for earlier, later in pairwise(moments))


def mean_stop(incidents: Sequence[dict[str, Any]]) -> float | None:
    """Mean cost of a stop, seconds. Several incidents that end one attempt are one stop: training stands still once.

    So are several for which one generation of ranks came together.
    """
    costs: dict[str, float] = {}
    for each in incidents:
        stopped = each["attempt"] or each["incident"]
        if each.get("generation") is not None:
            stopped = f"{stopped} {each['generation']}"
        costs[stopped] = max(costs.get(stopped, 0.0), each["cost"])
    return sum(costs.values()) / len(costs) if costs else None
