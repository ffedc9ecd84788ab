"""The front page of a logbook, as plain text and rows: Markdown, HTML and MLflow show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chronicles.ledger.summary import LedgerSummary
from chronicles.logbook import tables
from chronicles.logbook.entries.operators import halt_cause
from chronicles.logbook.evaluation_rows import Evaluations, evaluations
from chronicles.logbook.open_questions import questions
from chronicles.logbook.story.model import Afterthought
from chronicles.report.model import IncidentReport, LineageReport, VerdictReport
from chronicles.wording import count, day, duration, hours, minute, percent, when, whole
from opt_ops.core.state.status import Status
from opt_ops.core.values import Driver, Severity

_TONES = {Status.COMPLETED: "ok", Status.HALTED: "bad", Status.CANCELLED: "warn", Status.RECOVERING: "warn"}
_TONES |= {Status.ROLLING_BACK: "warn"}

ASK_MODE = "Ask mode: recoveries wait for an operator's approval, or for their deadline."

IN_SIGHT = 20 * 365 * 86400.0  # seconds: an end beyond that is no estimate
_MANY = 30  # incidents: of more than these, the front page lists those that touched training


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFigure:
    """A number in large type."""

    label: str
    value: str
    more: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What incidents have cost together."""

    steps_discarded: int
    seconds_down: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPage:
    """Everything above the log."""

    status: str  # with its age, unless it is an end
    tone: str  # of the status: a CSS class
    lead: str
    share: float  # of all steps, in percent
    figures: Sequence[KeyFigure]
    incidents: Sequence[IncidentReport]
    harmless: str
    totals: Totals
    tree: Sequence[tables.Branch]
    goodput: str
    reliability: str
    phases: Sequence[tables.TimeRow]
    lost: Sequence[tables.LostRow]
    stages: Sequence[tables.TimeRow]
    validation: Sequence[tables.ValidationRow]
    evaluations: Evaluations
    lemons: Sequence[tables.LemonRow]
    questions: Sequence[str]
    nodes: Sequence[VerdictReport]
    healthy_nodes: str
    allocations: Sequence[tables.AllocationRow]
    allocations_before: str
    as_of: str


def front_page(report: LineageReport, loss: float | None, thoughts: Sequence[Afterthought] = ()) -> FrontPage:
    """Everything above the log. `loss` is that of the newest kept update, `thoughts` are all afterthoughts."""
    incidents = report.incidents
    allocations, before = tables.allocations(report)
    watched = report.driver is Driver.SHADOW
    return FrontPage(
        status=known_status(report),
        tone=_TONES.get(report.status, ""),
        lead=lead(report),
        share=round(100 * min(1.0, report.step / report.total_steps), 2) if report.total_steps else 0,
        figures=figures(report, loss),
        incidents=[row for row in incidents if not _harmless(row)] if len(incidents) > _MANY else incidents,
        harmless=_harmless_ones(incidents),
        totals=totals(incidents),
        tree=tables.tree(report.runs, incidents),
        goodput=_WATCHED_TIME if watched else _goodput(report.ledger),
        reliability="" if watched else reliability(report.ledger),
        phases=() if watched else tables.phases(report),
        lost=() if watched else tables.lost(report),
        stages=() if watched else tables.stages(report),
        validation=tables.validation(report),
        evaluations=evaluations(report),
        lemons=tables.lemons(report),
        questions=questions(report, thoughts),
        nodes=tables.nodes(report.nodes),
        healthy_nodes=tables.healthy_nodes(report.nodes),
        allocations=allocations,
        allocations_before=f"{count(before, 'earlier allocation')} not listed." if before else "",
        as_of=when(report.as_of),
    )


def _harmless(row: IncidentReport) -> bool:
    return row.is_spare and row.drill is None


def _harmless_ones(incidents: Sequence[IncidentReport]) -> str:
    number = sum(map(_harmless, incidents)) if len(incidents) > _MANY else 0
    each = "Each excluded" if number > 1 else "It excluded"
    left = f"{count(number, 'more incident')} discarded no steps. {each} a node on which no rank ran."
    return f"{left} See the log." if number else ""


def totals(incidents: Sequence[IncidentReport]) -> Totals:
    """What incidents have cost together. Incidents that one attempt answers share the same loss; it counts once."""
    lost: dict[str, tuple[int, float]] = {}
    for row in incidents:
        answer = row.next_attempt or row.incident
        steps, seconds = lost.get(answer, (0, 0.0))
        lost[answer] = max(steps, row.steps_discarded or 0), max(seconds, row.seconds_down or 0.0)
    return Totals(
        steps_discarded=sum(steps for steps, _ in lost.values()),
        seconds_down=sum(seconds for _, seconds in lost.values()),
    )


def known_status(report: LineageReport) -> str:
    """The status; of a lineage that has not ended, with the time up to which it is known.

    A page stays as it was drawn when its daemon dies, so it must say how old it is.
    """
    if report.ended or report.as_of is None:
        return str(report.status)
    return f"{report.status}, as of {when(report.as_of)}"


def lead(report: LineageReport) -> str:
    """A few sentences: the status, the incidents, whether an operator is needed."""
    if report.driver is Driver.SHADOW:
        return f"{_watched(report)} {_incidents(report)}".rstrip()
    return " ".join(filter(None, (_standing(report), _size(report), _incidents(report), _operators(report))))


_WATCHED_TIME = "This training is only watched, and nobody can say since when it trains, so there is no goodput."


def _watched(report: LineageReport) -> str:
    """What stands first in the logbook of a job that another launcher runs."""
    why = (report.why or "").rstrip(" .")
    seen = f"Seen until step {whole(report.step)}." if report.step else "No step was seen yet."
    rule = "Only watched (shadow mode): opt-ops touches nothing, and what it decides is advice."
    return f"{rule} {seen}{f' {why[:1].upper()}{why[1:]}.' if why else ''}"


def _size(report: LineageReport) -> str:
    shape, size = report.shape, report.size
    if report.ended or shape is None or size == shape.nodes:
        return ""
    return f"Attempts start on {whole(size)} of {count(shape.nodes, 'node')}, because no more are available."


def _standing(report: LineageReport) -> str:
    total, step = report.total_steps, report.step
    of = f"{whole(step)} of {count(total, 'step')}" if total else count(step, "step")
    wall, why = duration(report.ledger.wall_seconds), (report.why or "").rstrip(" .")
    match report.status:
        case Status.NEW:
            return "No daemon has read the request yet."
        case Status.COMPLETED:
            return f"All {count(total or step, 'step')} were trained in {wall}."
        case Status.HALTED:
            return f"Training stopped after {of}. {halt_cause(report, report.halts[-1])}"
        case Status.CANCELLED:
            return f"Cancelled after {of}, as requested by {why}."
        case Status.PAUSED if report.paused:
            return f"Paused by {why}. {_trained(of)}"
        case Status.PAUSED:
            return f"Resumed, and waiting for nodes. {_trained(of)}"
        case Status.PLANNED | Status.QUEUED:
            return f"Waiting for nodes. {_trained(of)}"
        case Status.PREFLIGHT | Status.STARTING:
            return f"Starting. {_trained(of)}"
        case Status.RECOVERING | Status.ROLLING_BACK:
            return f"{str(report.status).capitalize().replace('_', ' ')}. {_trained(of)}"
        case _:
            return f"{_trained(of).rstrip('.')} in {wall}.{_end(report)}"


def _trained(of: str) -> str:
    return f"{of} {'was' if of == '1 step' else 'were'} trained."


def _end(report: LineageReport) -> str:
    left = seconds_left(report)
    if left is None:
        return ""
    return f" At this goodput the rest takes {duration(left)}, until {minute((report.as_of or 0.0) + left)}."


def seconds_left(report: LineageReport) -> float | None:
    """Seconds until the last step, if goodput stays as it was so far; None if that is not known, or is no estimate."""
    spent, total = report.ledger, report.total_steps
    if not spent.goodput or not spent.healthy_step_seconds or not total:
        return None
    left = (total - report.step) * spent.healthy_step_seconds / spent.goodput
    return left if left < IN_SIGHT else None


def _incidents(report: LineageReport) -> str:
    rows = [row for row in report.incidents if row.is_failure]
    others = _moves_and_requests(report.incidents)
    if not rows:
        return f"No incident so far{others}." if report.runs else ""
    drills = sum(row.drill is not None for row in rows)
    all_of_them = ", all drills" if len(rows) > 1 else ", a drill"
    of = {0: "", len(rows): all_of_them}.get(drills, f", {whole(drills)} of them drills")
    number = f"{count(len(rows), 'incident')}{of}{interrupted(rows)}{recovered_in_place(rows)}"
    return f"{number}: {_outcomes(rows)}{others}. {count(report.ledger.steps_discarded, 'step')} discarded."


def interrupted(rows: Sequence[IncidentReport]) -> str:
    """Of many incidents, how many interrupted training."""
    stopped = sum(row.interrupts_training for row in rows)
    return f", {whole(stopped)} of which interrupted training" if stopped < len(rows) > _MANY else ""


def recovered_in_place(rows: Sequence[IncidentReport]) -> str:
    """After how many only the lost ranks were replaced."""
    number = sum(row.in_place is True for row in rows)
    return f", {whole(number)} recovered in place" if number else ""


def _moves_and_requests(rows: Sequence[IncidentReport]) -> str:
    planned = sum(row.planned for row in rows)
    requested = sum(row.requested for row in rows)
    parts = ((planned, count(planned, "planned move")), (requested, count(requested, "requested change")))
    return "".join(f"; {what}" for number, what in parts if number)


def _outcomes(rows: Sequence[IncidentReport]) -> str:
    still_open = sum(row.closed is None for row in rows)
    failed = sum(row.proven is False for row in rows)
    advisory = sum(row.advisory for row in rows)
    answered = sum(row.closed is not None and row.proven is None and not row.advisory for row in rows)
    if not still_open and not failed and not advisory and not answered:
        return "proven" if len(rows) == 1 else "all proven"
    parts = (
        (sum(row.proven is True for row in rows), "proven"),
        (still_open, "still open"),
        (failed, "NOT PROVEN"),
        (answered, "answered by an operator"),
        (advisory, "advisory only"),
    )
    return ", ".join(f"{number} {what}" if len(rows) > 1 else what for number, what in parts if number)


def _operators(report: LineageReport) -> str:
    if report.status == Status.HALTED:
        return "An operator is needed."
    if not report.ended and report.driver == Driver.OPERATOR:
        return "An operator drives: opt-ops watches and advises."
    if not report.ended and report.driver == Driver.ASK:
        return ASK_MODE
    if not report.ended and report.driver == Driver.SHADOW:
        return "Shadow mode: another launcher runs the training, opt-ops only watches."
    pages = max(len(report.halts), sum(alert.severity == Severity.PAGE for alert in report.alerts))
    if pages:
        return f"An operator was needed {times(pages)}."
    steered = any(each.verb not in ("start", "stop") and not each.refused for each in report.operator_requests)
    if report.status != Status.COMPLETED or not report.incidents:
        return ""
    return "Operators made changes, but none was needed." if steered else "No operator was needed."


def times(number: int) -> str:
    """`once`, `twice`, `3 times`."""
    return {1: "once", 2: "twice"}.get(number) or count(number, "time")


def figures(report: LineageReport, loss: float | None) -> list[KeyFigure]:
    """The few numbers in large type."""
    spent, total = report.ledger, report.total_steps
    rows = [row for row in report.incidents if row.is_failure]
    drills = sum(row.drill is not None for row in rows)
    found = [("Steps", whole(report.step), f"of {whole(total)}" if total else "")]
    if loss is not None:
        found.append(("Loss", f"{loss:.3f}", "nats per token, newest"))
    if len(report.validation) == 1 and (corpus := report.validation[0]).loss is not None:
        found.append(("Validation loss", f"{corpus.loss:.3f}", f"after step {whole(corpus.step)}"))
    if spent.goodput is not None and report.driver is not Driver.SHADOW:
        found.append(("Goodput", percent(spent.goodput), f"healthy step {spent.healthy_step_seconds:.3g} s"))
    left = None if report.ended else seconds_left(report)
    if left is not None:
        end = day((report.as_of or 0.0) + left)
        found.append(("Expected end", end, f"in {duration(left)}, at this goodput"))
    found.append(("Incidents", whole(len(rows)), f"{count(drills, 'drill')}" if drills else ""))
    found.append(("Discarded", whole(spent.steps_discarded), "steps"))
    found.append(("Wall clock", duration(spent.wall_seconds), f"since {when(report.started)}"))
    return [KeyFigure(label=label, value=value, more=more) for label, value, more in found]


def _goodput(spent: LedgerSummary) -> str:
    if spent.goodput is None:
        return "There is no kept step yet, so there is no goodput."
    return (
        f"Goodput is {percent(spent.goodput)}: {count(spent.kept_steps, 'kept step')} × "
        f"{spent.healthy_step_seconds:.3g} s (healthy step) ÷ {duration(spent.wall_seconds)} (wall clock). "
        f"Without any stop it would have taken {100 * spent.goodput:.0f} % of the time. "
        f"The share of ideal is {percent(spent.share_of_ideal)}, with an ideal step of "
        f"{spent.ideal_step_seconds:.3g} s."
    )


def reliability(spent: LedgerSummary) -> str:
    """Failures, recoveries, restarts, nodes and energy, in sentences."""
    found: list[str] = []
    failures, restarts, resources = spent.reliability, spent.restarts, spent.resources
    if failures.failures:
        found.append(f"{count(failures.failures, 'failure')}, one per {duration(failures.mtbf_seconds)} of training")
        if failures.mttr_seconds is not None:
            found.append(f"mean downtime of a recovery: {duration(failures.mttr_seconds)}")
    if restarts.total:
        ways = ((restarts.automatic, "automatic"), (restarts.manual, "manual"), (restarts.planned, "planned"))
        found.append(f"{count(restarts.total, 'restart')}: {', '.join(f'{n} {way}' for n, way in ways if n)}")
    if spent.involvement.longest_hands_off_seconds and spent.involvement.pages:
        found.append(f"longest time without a page: {duration(spent.involvement.longest_hands_off_seconds)}")
    if resources.node_hours:
        found.append(f"{hours(resources.node_hours)} node-hours, {hours(resources.node_hours_lost)} of them lost")
    if resources.kwh is not None:
        co2 = f", {resources.tco2e:.3g} tCO2e" if resources.tco2e is not None else ""
        found.append(f"{hours(resources.kwh)} kWh{co2}")
    if resources.cost is not None:
        found.append(f"{resources.currency} {resources.cost:,.0f}")
    return " ".join(f"{part[:1].upper()}{part[1:]}." for part in found)
