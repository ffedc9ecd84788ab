"""The ledger over all lineages: what all of them cost, and what share was abandoned, lost, forked or a drill.

Reports of training runs leave this out: OPT's own paper says that failed and experimental runs came to about as much as
the run that is published (arXiv 2205.01068, appendix C).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from chronicles.ledger.by_cause import SpentOnKind
from chronicles.ledger.conventional import Conventional, conventional
from chronicles.ledger.summary import LedgerSummary, summarize
from chronicles.record import LineageRecord, Moment, moment
from opt_ops.config import Rates
from opt_ops.core.state.status import ENDED, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One lineage in the sums."""

    status: Status
    is_fork: bool
    started: float | None
    as_of: float | None
    summary: LedgerSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What several lineages come to. None: not known of any of them."""

    lineages: int
    node_hours: float | None
    gpu_hours: float | None
    kwh: float | None
    tco2e: float | None
    cost: float | None
    steps_kept: int
    steps_taken_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleSums:
    """What people had to do. Seconds are estimates from the journals."""

    calls: int
    seconds_waited: float
    person_seconds: float
    requests: int
    by_author: Mapping[str, int] | None  # requests; None: left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Energy and emissions by the counters of the GPUs."""

    gpu_kwh: float | None
    kwh: float | None
    tco2e: float | None
    metered_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConventionalTotal(Conventional):
    """The conventional carbon figure of everything, and of completed lineages alone, as papers count."""

    completed_only: Conventional | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerTotal:
    """The ledger over all lineages. Shares are of all node-hours; None: no node-hours are known."""

    lineages: int
    since: Moment | None
    until: Moment | None
    by_end: Mapping[str, Sums]
    all: Sums
    share_abandoned: float | None
    share_lost: float | None
    share_forks: float | None
    share_drills: float | None
    by_cause: tuple[SpentOnKind, ...]
    people: PeopleSums
    measured: Measured
    conventional: ConventionalTotal | None
    currency: str


def account(record: LineageRecord, rates: Rates) -> Account:
    """A lineage as the sums need it."""
    return Account(
        status=record.state.status,
        is_fork=record.state.lineage is not None and record.state.lineage.parent is not None,
        started=record.started,
        as_of=record.as_of,
        summary=summarize(record, rates),
    )


def total(accounts: Sequence[Account], rates: Rates, since: float | None = None, *, names: bool = True) -> LedgerTotal:
    """The sums over the lineages that ran at `since` or later, each as a whole. `names`: say who asked how often."""
    chosen = [each for each in accounts if since is None or (each.as_of or 0.0) >= since]
    ends = {"running": None, "completed": Status.COMPLETED, "halted": Status.HALTED, "cancelled": Status.CANCELLED}
    by_end = {name: _sums([each for each in chosen if _end(each) is end]) for name, end in ends.items()}
    everything = _sums(chosen)
    resources = [each.summary.resources for each in chosen]
    abandoned = [by_end["halted"].node_hours, by_end["cancelled"].node_hours]
    lost = [each.summary.resources.node_hours_lost for each in chosen if each.status is Status.COMPLETED]
    forks = [each.summary.resources.node_hours for each in chosen if each.is_fork]
    figure = conventional(everything.gpu_hours, rates)
    of_completed = conventional(by_end["completed"].gpu_hours, rates)
    return LedgerTotal(
        lineages=len(chosen),
        since=moment(min((each.started for each in chosen if each.started is not None), default=None)),
        until=moment(max((each.as_of for each in chosen if each.as_of is not None), default=None)),
        by_end=by_end,
        all=everything,
        share_abandoned=_share(abandoned, everything.node_hours),
        share_lost=_share(lost, everything.node_hours),
        share_forks=_share(forks, everything.node_hours),
        share_drills=_share([each.node_hours_of_drills for each in resources], everything.node_hours),
        by_cause=_by_cause(chosen),
        people=_people(chosen, names),
        measured=Measured(
            gpu_kwh=_sum(each.gpu_kwh for each in resources),
            kwh=everything.kwh,
            tco2e=everything.tco2e,
            metered_seconds=sum(each.metered_seconds for each in resources),
        ),
        conventional=ConventionalTotal(**asdict(figure), completed_only=of_completed) if figure else None,
        currency=rates.currency,
    )


def _end(each: Account) -> Status | None:
    return each.status if each.status in ENDED else None


def _sums(accounts: Sequence[Account]) -> Sums:
    resources = [each.summary.resources for each in accounts]
    return Sums(
        lineages=len(accounts),
        node_hours=_sum(each.node_hours for each in resources),
        gpu_hours=_sum(each.gpu_hours for each in resources),
        kwh=_sum(each.kwh for each in resources),
        tco2e=_sum(each.tco2e for each in resources),
        cost=_sum(each.cost for each in resources),
        steps_kept=sum(each.summary.kept_steps for each in accounts),
        steps_taken_back=sum(each.summary.steps_discarded for each in accounts),
    )


def _by_cause(accounts: Sequence[Account]) -> tuple[SpentOnKind, ...]:
    rows: defaultdict[str, list[SpentOnKind]] = defaultdict(list)
    for each in accounts:
        for row in each.summary.by_cause:
            rows[row.kind].append(row)
    found = [
        SpentOnKind(
            kind=kind,
            incidents=sum(row.incidents for row in known),
            seconds=sum(row.seconds for row in known),
            node_hours=_sum(row.node_hours for row in known),
            kwh=_sum(row.kwh for row in known),
            tco2e=_sum(row.tco2e for row in known),
            cost=_sum(row.cost for row in known),
            unmetered_seconds=sum(row.unmetered_seconds for row in known),
        )
        for kind, known in rows.items()
    ]
    return tuple(sorted(found, key=lambda row: (-row.seconds, row.kind)))


def _people(accounts: Sequence[Account], names: bool) -> PeopleSums:
    people = [each.summary.people for each in accounts]
    authors: Counter[str] = Counter()
    for each in people:
        authors.update(each.by_author)
    return PeopleSums(
        calls=sum(each.summary.involvement.pages for each in accounts),
        seconds_waited=sum(each.seconds_waited for each in people),
        person_seconds=sum(each.person_seconds for each in people),
        requests=sum(each.requests for each in people),
        by_author=dict(sorted(authors.items())) if names else None,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(parts: Iterable[float | None], whole: float | None) -> float | None:
    return (_sum(parts) or 0.0) / whole if whole else None
