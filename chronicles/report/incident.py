"""Builds the incidents of a report. Without telemetry in the record, `step_failed` is what the journal knows of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chronicles.kept_curve import AttemptCurve
from chronicles.ledger.summary import LedgerSummary, node_hours_lost, summarize
from chronicles.operators import notified_at
from chronicles.record import LineageRecord, Moment, moment
from chronicles.report.model import AfterthoughtReport, IncidentReport, ProbeReport, StacksReport
from chronicles.report.proposal import ProposalReport
from opt_ops.core import events as e
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.decide.trouble import remedy
from opt_ops.core.failures import classes
from opt_ops.core.schedule import PlannedLr
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Attempt, Members
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action


def incidents(record: LineageRecord, ledger: LedgerSummary | None = None) -> tuple[IncidentReport, ...]:
    """The incidents of a lineage, in order of opening. `ledger` is the lineage's own, if it is known already."""
    state = record.state
    hours = node_hours_lost(state, ledger or summarize(record))
    corrected = {x.event.target for x in record.entries if isinstance(x.event, e.NoteAdded) and x.event.correction}
    opened = _entries(record, e.IncidentOpened)
    decided = _entries(record, e.RecoveryDecided)
    notified = notified_at(record)
    curves = {curve.attempt: curve for curve in record.curves}
    return tuple(
        _incident(
            state,
            incident,
            curves.get(incident.attempt or ""),
            notified_at=notified[name],
            node_hours_lost=hours[name],
            corrected=name in corrected,
            opened_entry=opened.get(name),
            decided_entry=decided.get(name),
        )
        for name, incident in state.incidents.items()
    )


def _entries(record: LineageRecord, kind: type[e.IncidentOpened | e.RecoveryDecided]) -> dict[str, str]:
    """By incident: the newest entry of this kind about it, as notes name entries."""
    return {x.event.incident: f"{record.lineage}-e{x.seq}" for x in record.entries if isinstance(x.event, kind)}


def _incident(state: State, incident: Incident, curve: AttemptCurve | None, **known: Any) -> IncidentReport:
    decision, hit = incident.decision, state.attempts.get(incident.attempt or "")
    following = state.attempts.get(incident.next_attempt or "")
    drill = state.drills.get(incident.drill or "")
    decided = decision.checkpoint if decision else None
    resumed = decided if decision and decision.action is Action.ROLLBACK else None
    if resumed is None and following:
        resumed = following.checkpoint
    nature = classes.nature(incident.kind, incident.signal)
    word, basis = classes.confidence(incident.kind, _Finding.of(incident), incident.drill is not None)
    return IncidentReport(
        incident=incident.name,
        kind=incident.kind,
        cause=incident.cause,
        detector=incident.detector,
        drill=incident.drill,
        fault=drill.fault if drill else None,
        nodes=incident.nodes,
        attempt=incident.attempt,
        at=Moment(incident.at),
        opened=Moment(incident.opened_at),
        closed=moment(incident.closed_at),
        evidence=incident.evidence,
        step_failed=_step_at(curve, incident.at, incident.step_failed),
        onset_step=incident.onset_step,
        last_step=hit.last_step if hit and hit.outcome and following else None,
        step_resumed=incident.step_resumed,
        steps_discarded=incident.steps_lost,
        seconds_down=incident.seconds_down,
        **_seconds(state, incident, following),
        **_in_place(state, incident),
        action=decision.action if decision else None,
        playbook=f"{decision.playbook}/v{decision.version}" if decision else None,
        rung=decision.rung + 1 if decision else None,
        why=decision.why if decision else None,
        checkpoint_step=resumed.step if resumed else None,
        lr_factor=decision.lr_factor if decision else None,
        excluded=decision.exclude if decision else (),
        settings=decision.settings if decision else (),
        skip_batches=_skipped(decision) if decision else 0,
        save_first=decision.save_first if decision else False,
        advisory=decision.advice if decision else False,
        planned=nature is classes.Nature.MOVE,
        answered=incident.answered,
        stacks=_stacks(incident),
        **_learning_rates(state, incident, hit),
        run_before=hit.run if hit else None,
        run_after=following.run if following else None,
        next_attempt=incident.next_attempt,
        proven=incident.proven,
        proof=incident.proof,
        confidence=word,
        confidence_why=basis,
        causes=incident.causes,
        probes=tuple(_probes(incident)),
        proposals=tuple(_proposals(incident, curve)),
        for_cause=decision.cause if decision else None,
        remedy=remedy(decision),
        refused_step=decision.refuses.step if decision and decision.refuses else None,
        afterthoughts=tuple(
            AfterthoughtReport(topic=each.topic, text=each.text, at=Moment(each.at)) for each in incident.afterthoughts
        ),
        requested=nature is classes.Nature.REQUEST,
        decided_checkpoint_step=decided.step if decided else None,
        **known,
    )


def _skipped(decision: e.RecoveryDecided) -> int:
    """How many batches are left out, around the onset or from the checkpoint on."""
    return decision.skip_batches + sum(skip.last - skip.first + 1 for skip in decision.skips)


@dataclass(frozen=True, slots=True)
class _Finding:
    """What the confidence in a cause rests on."""

    evidence: Mapping[str, Any]
    stacks_name_ranks: bool

    @classmethod
    def of(cls, incident: Incident) -> _Finding:
        return cls(incident.evidence, incident.stacks is not None and bool(incident.stacks.odd))


def _probes(incident: Incident) -> Iterator[ProbeReport]:
    ends = {each.probe: each for each in incident.probe_ends}
    for probe in incident.probes.probes if incident.probes else ():
        end = ends.get(probe.kind)
        yield ProbeReport(
            probe=probe.kind,
            node=probe.node,
            spiked=end.spiked if end else None,
            step=end.step if end else None,
            why=end.why if end else "it showed nothing before the wait was over",
        )


def _proposals(incident: Incident, curve: AttemptCurve | None) -> Iterator[ProposalReport]:
    for each in incident.proposals:
        made, answer = each.made, each.answer
        begins, ends = _step_at(curve, each.at, made.step), None
        if answer is not None and each.answered_at is not None:
            ends = _step_at(curve, each.answered_at, answer.step)
        yield ProposalReport(
            proposal=each.name,
            made=Moment(each.at),
            deadline=Moment(made.deadline),
            default=made.default,
            status=each.status,
            answered=moment(each.answered_at),
            author=answer.author if answer else None,
            reason=answer.reason if answer else "",
            steps_waited=max(0, ends - begins) if begins is not None and ends is not None else None,
        )


def _step_at(curve: AttemptCurve | None, at: float, journaled: int | None) -> int | None:
    """The newest update at a time. The journal alone lags behind by up to a minute of training."""
    times = [point.ts for point in curve.points] if curve else []
    seen = bisect_right(times, at)
    by_telemetry = curve.points[seen - 1].step if curve and seen else None
    return max((step for step in (journaled, by_telemetry) if step is not None), default=None)


def _stacks(incident: Incident) -> StacksReport | None:
    taken = incident.stacks
    if taken is None:
        return None
    return StacksReport(odd=taken.odd, silent=taken.silent, nodes=taken.nodes, groups=taken.groups)


def _seconds(state: State, incident: Incident, following: Attempt | None) -> Mapping[str, Any]:
    ordered, found = in_place.replacements(state, incident), in_place.joined(state, incident)
    relaunched = ordered[0].intended_at if found else following.intended_at if following else None
    first_step = _first_step_at(state, incident, found) if found else following.first_step_at if following else None
    return {
        "seconds_to_see": max(0.0, incident.opened_at - incident.at),
        "seconds_to_decide": _between(incident.opened_at, incident.decided_at),
        "seconds_to_relaunch": _between(incident.decided_at, relaunched),
        "seconds_to_first_step": _between(relaunched, first_step),
    }


def _first_step_at(state: State, incident: Incident, found: Members) -> float | None:
    """When the first step after a replacement was made, by its own generation or a later one."""
    members = state.attempts[incident.attempt or ""].members
    later = (each.first_step_at for each in members if each.generation >= found.generation)
    return next((at for at in later if at is not None), None)


def _in_place(state: State, incident: Incident) -> Mapping[str, Any]:
    """What became of the ranks that were lost."""
    found, decision = in_place.joined(state, incident), incident.decision
    ordered = in_place.replacements(state, incident)
    newest = found or (ordered[-1] if ordered else None)
    return {
        "in_place": in_place.is_in_place(state, incident),
        "generation": newest.generation if newest else None,
        "ranks_replaced": newest.new if newest else decision.ranks if decision else (),
        "pids_kept": incident.proof.get("pids_kept"),
        "steps_repeated": found.repeated if found else None,
        "fell_back": incident.fell_back or (decision.not_in_place if decision else None),
        "what_became": in_place.in_sentences(state, incident),
    }


def _between(start: float | None, end: float | None) -> float | None:
    return max(0.0, end - start) if start is not None and end is not None else None


def _learning_rates(state: State, incident: Incident, hit: Attempt | None) -> Mapping[str, float | None]:
    """At the first proven update: what the run before would have used, and what was read back from the optimizer."""
    known = baseline(state)
    readbacks = incident.proof.get("readbacks") or []
    if known is None or hit is None or not readbacks:
        return {"lr_before": None, "lr_after": None}
    run = state.runs[hit.run]
    schedule, _ = with_settings(*known, run.settings)
    first = next((each for each in readbacks if each["lr"]), readbacks[0])  # zero times any factor is zero
    planned = PlannedLr(schedule=schedule, factors=run.lr_factors)
    return {"lr_before": planned.due(first["step"], first.get("base_lr")), "lr_after": first["lr"]}
