"""The ledger of a lineage in numbers: time, failures, restarts, nodes, energy and cost. docs/ledger.md defines each."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chronicles.ledger.by_cause import SpentOnKind, by_cause, by_kind, cost, emissions, held, kwh_of, metered
from chronicles.ledger.conventional import Conventional, conventional
from chronicles.ledger.people import People, pages_of, people
from chronicles.ledger.wall_clock import Ledger, Stage, TimePhase, ledger
from chronicles.record import LineageRecord
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.failures.classes import Domain, Nature, nature, row
from opt_ops.core.state.in_place import joined
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action

_FLAT = {"flat": True}  # in JSON its fields stand beside the others


@dataclass(frozen=True, slots=True, kw_only=True)
class LostToCause:
    """What one cause has cost: an incident, or a phase of the wall clock."""

    cause: str
    seconds_repeated: float
    seconds_down: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LostToKind:
    """What one failure class has cost, or a phase of the wall clock."""

    kind: str
    incidents: int
    drills: int
    seconds: float
    seconds_by_stage: Mapping[Stage, float]
    node_hours: float | None
    kwh: float | None
    tco2e: float | None
    cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """A failure stopped training, was not requested and no drill. A recovery made a step again; of drills, too."""

    failures: int
    mtbf_seconds: float | None
    recoveries: int
    recoveries_in_place: int
    mttr_seconds: float | None
    mean_seconds_to_see: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """Launches after the first, each of exactly one origin; submissions to the scheduler after the first."""

    total: int = field(metadata={"key": "restarts"})
    manual: int = field(metadata={"key": "restarts_manual"})
    planned: int = field(metadata={"key": "restarts_planned"})
    automatic: int = field(metadata={"key": "restarts_automatic"})
    requeues: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanInvolvement:
    """How often on-call was paged, and the longest time without a page."""

    pages: int = field(metadata={"key": "calls"})
    longest_hands_off_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyAndCost:
    """What the nodes came to. None: not metered, or the site has set no rate."""

    node_hours: float | None
    node_hours_lost: float | None
    node_hours_of_drills: float
    gpu_hours: float | None
    gpu_kwh: float | None
    metered_seconds: float
    kwh: float | None
    tco2e: float | None
    cost: float | None
    currency: str
    conventional: Conventional | None  # of everything that was held
    conventional_kwh: float | None  # of kept updates alone, as papers count
    conventional_tco2e: float | None
    tdp_watts: float | None
    factor_source: str | None  # of the factor of the grid; without it there is no figure in tonnes
    factor_year: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSummary:
    """Everything that the ledger knows of a lineage. Shares are between 0 and 1; None: not known."""

    kept_steps: int
    healthy_step_seconds: float | None
    wall_seconds: float
    goodput: float | None
    steps_discarded: int = field(metadata={"key": "steps_repeated"})
    seconds_by_phase: Mapping[TimePhase, float]
    lost: tuple[LostToCause, ...]
    seconds_slower_than_healthy: float | None
    ideal_step_seconds: float | None
    share_of_ideal: float | None
    ettr: float | None
    seconds_saving: float
    lost_by_kind: tuple[LostToKind, ...]  # the most expensive first
    seconds_by_stage: Mapping[Stage, float]
    reliability: Reliability = field(metadata=_FLAT)
    restarts: Restarts = field(metadata=_FLAT)
    involvement: HumanInvolvement = field(metadata=_FLAT)
    resources: EnergyAndCost = field(metadata=_FLAT)
    people: People = field(metadata=_FLAT)
    by_cause: tuple[SpentOnKind, ...]  # the whole wall clock, kept training included


def summarize(record: LineageRecord, rates: Rates | None = None) -> LedgerSummary:
    """Compute the ledger of a lineage from its journal alone.

    Args:
        record: The lineage, with or without telemetry.
        rates: The site's figures, for the share of an ideal, emissions and cost.
    """
    rates = rates or Rates()
    book, state = ledger(record), record.state
    causes = by_cause(record, book)
    spent = by_kind(record, causes, rates)
    drills = sum(causes[i.name].node_seconds for i in state.incidents.values() if i.drill and i.name in causes) / 3600
    kept = book.steps_kept * (book.healthy_step_seconds or 0.0)
    return LedgerSummary(
        kept_steps=book.steps_kept,
        healthy_step_seconds=book.healthy_step_seconds,
        wall_seconds=book.wall,
        goodput=book.goodput,
        steps_discarded=book.steps_repeated,
        seconds_by_phase={phase: book.phases[phase] for phase in TimePhase},
        lost=tuple(
            LostToCause(cause=cause, seconds_repeated=book.repeated(cause), seconds_down=book.downtime(cause))
            for cause in sorted(book.lost)
            if cause != TimePhase.OTHER and any(book.lost[cause].values())
        ),
        seconds_slower_than_healthy=book.phases[TimePhase.KEPT] - kept if book.healthy_step_seconds else None,
        ideal_step_seconds=rates.ideal_step_seconds or book.bare_step_seconds,
        share_of_ideal=book.share_of_ideal(rates.ideal_step_seconds),
        ettr=book.ettr,
        seconds_saving=book.seconds_saving,
        lost_by_kind=_by_kind(book, state, spent),
        seconds_by_stage={stage: sum(stages[stage] for stages in book.lost.values()) for stage in Stage},
        reliability=_reliability(record, book),
        restarts=_restarts(record),
        involvement=_human_involvement(record, book),
        resources=_energy_and_cost(record, book, rates, drills),
        people=people(record, (record.started or 0.0) + book.wall),
        by_cause=spent,
    )


def _by_kind(book: Ledger, state: State, spent: Sequence[SpentOnKind]) -> tuple[LostToKind, ...]:
    """Lost time by failure class or phase, the most expensive first."""
    costs = {row.kind: row for row in spent}
    kinds: defaultdict[str, defaultdict[Stage, float]] = defaultdict(lambda: defaultdict(float))
    incidents: defaultdict[str, list[Incident]] = defaultdict(list)
    for incident in state.incidents.values():
        incidents[incident.kind].append(incident)
    for cause, stages in book.lost.items():
        kind = state.incidents[cause].kind if cause in state.incidents else cause
        for stage, seconds in stages.items():
            kinds[kind][stage] += seconds
    found = [
        LostToKind(
            kind=kind,
            incidents=len(incidents[kind]),
            drills=sum(incident.drill is not None for incident in incidents[kind]),
            seconds=sum(stages.values()),
            seconds_by_stage={stage: stages[stage] for stage in Stage},
            node_hours=costs[kind].node_hours if kind in costs else None,
            kwh=costs[kind].kwh if kind in costs else None,
            tco2e=costs[kind].tco2e if kind in costs else None,
            cost=costs[kind].cost if kind in costs else None,
        )
        for kind, stages in kinds.items()
        if any(stages.values()) or incidents[kind]
    ]
    return tuple(sorted(found, key=lambda each: (-each.seconds, each.kind)))


# ---- failures, restarts, pages ----


def _reliability(record: LineageRecord, book: Ledger) -> Reliability:
    found = [i for i in record.state.incidents.values() if _stopped_training(i)]
    failures = [i for i in found if i.drill is None]
    trained = book.phases[TimePhase.KEPT] + book.phases[TimePhase.LOST]
    in_place = [i for i in found if joined(record.state, i) is not None]
    downs = [i.seconds_down for i in found if i.seconds_down is not None and (i.next_attempt or i in in_place)]
    seen = [max(0.0, i.opened_at - i.at) for i in found]
    return Reliability(
        failures=len(failures),
        mtbf_seconds=trained / len(failures) if failures else None,
        recoveries=len(downs),
        recoveries_in_place=sum(i.seconds_down is not None for i in in_place),
        mttr_seconds=sum(downs) / len(downs) if downs else None,
        mean_seconds_to_see=sum(seen) / len(seen) if seen else None,
    )


_STOPPING = (Action.REPLACE_RANKS, Action.RESTART, Action.ROLLBACK, Action.HALT)


def _stopped_training(incident: Incident) -> bool:
    decision = incident.decision
    stops = decision is not None and decision.action in _STOPPING
    return stops and incident.acted_on and nature(incident.kind, incident.signal) is Nature.FAULT


def _restarts(record: LineageRecord) -> Restarts:
    origins: list[str] = []
    requested, first = False, True
    for entry in record.entries:
        event = entry.event
        if isinstance(event, (e.ResumeRequested, e.ChangeRequested)):
            requested = True
        elif isinstance(event, e.AttemptIntended):
            if not first:
                origins.append(_restart_origin(record.state, event, requested))
            requested, first = False, False
    submitted = sum(isinstance(entry.event, e.AllocationSubmitted) for entry in record.entries)
    return Restarts(
        total=len(origins),
        manual=origins.count("manual"),
        planned=origins.count("planned"),
        automatic=origins.count("automatic"),
        requeues=max(0, submitted - 1),
    )


def _restart_origin(state: State, event: e.AttemptIntended, requested: bool) -> str:
    incident = state.incidents.get(event.incident or "")
    if requested or (incident is not None and row(incident.kind).domain is Domain.OPERATOR):
        return "manual"
    planned = incident is not None and nature(incident.kind, incident.signal) is Nature.MOVE
    return "planned" if planned else "automatic"


def _human_involvement(record: LineageRecord, book: Ledger) -> HumanInvolvement:
    """Pages, and the longest time between two of them. What operators do of their own accord is no page."""
    if record.started is None:
        return HumanInvolvement(pages=0, longest_hands_off_seconds=None)
    end = record.started + book.wall
    pages = sorted(pages_of(record, end))
    free, since = [0.0], record.started
    for begin, answered in pages:
        free.append(begin - since)
        since = max(since, answered)
    free.append(end - since)
    return HumanInvolvement(pages=len(pages), longest_hands_off_seconds=max(free))


# ---- nodes, energy, cost ----


def _energy_and_cost(record: LineageRecord, book: Ledger, rates: Rates, drills: float) -> EnergyAndCost:
    nodes = held(record, (record.started or 0.0) + book.wall)
    hours = None if nodes is None else sum(each.nodes * (each.end - each.begin) for each in nodes) / 3600
    counted = metered(record)
    gpu_kwh = kwh_of(sum(event.joules for event in counted)) if counted else None
    kwh = gpu_kwh * rates.pue if gpu_kwh is not None else None
    share = book.phases[TimePhase.KEPT] / book.wall if book.wall else None
    gpus = _gpus_per_node(record.state) if hours is not None else None
    gpu_hours = hours * gpus if hours is not None and gpus is not None else None
    of_kept = conventional(_node_hours_kept(record.state, book) * gpus, rates) if gpus is not None else None
    return EnergyAndCost(
        node_hours=hours,
        node_hours_lost=hours * (1 - share) if hours is not None and share is not None else None,
        node_hours_of_drills=drills,
        gpu_hours=gpu_hours,
        gpu_kwh=gpu_kwh,
        metered_seconds=sum(event.until - event.since for event in counted),
        kwh=kwh,
        tco2e=emissions(kwh, rates),
        cost=cost(kwh, hours, rates),
        currency=rates.currency,
        conventional=conventional(gpu_hours, rates),
        conventional_kwh=of_kept.kwh if of_kept else None,
        conventional_tco2e=of_kept.tco2e if of_kept else None,
        tdp_watts=rates.gpu_tdp_watts,
        factor_source=rates.factor_source,
        factor_year=rates.factor_year,
    )


def _node_hours_kept(state: State, book: Ledger) -> float:
    """Time in kept updates × the nodes that made them. Spares are left out."""
    attempts = list(state.attempts.values())
    begins = [each.intended_at for each in attempts]
    kept = (span for span in book.spans if span.cause == TimePhase.KEPT)
    makers = ((span, attempts[bisect_right(begins, span.begin) - 1]) for span in kept)
    return sum((span.end - span.begin) * len(maker.nodes) for span, maker in makers) / 3600


def _gpus_per_node(state: State) -> int:
    """The GPUs that most nodes report; one for each rank where none reports any."""
    reported = Counter(len(node.gpus) for node in state.nodes.values() if node.gpus)
    return reported.most_common(1)[0][0] if reported else state.shape.ranks_per_node


def node_hours_lost(state: State, summary: LedgerSummary) -> dict[str, float | None]:
    """By incident: downtime and repeated steps × the nodes of the attempt that it hit; None without such an attempt."""
    seconds = {each.cause: each.seconds_repeated + each.seconds_down for each in summary.lost}
    nodes = {i.name: len(state.attempts[i.attempt].nodes) if i.attempt else 0 for i in state.incidents.values()}
    return {name: seconds.get(name, 0.0) * number / 3600 if number else None for name, number in nodes.items()}
