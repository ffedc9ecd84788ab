"""Alerts: one when an incident is acted on, one when it is over, and a page when an operator is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from zlib import crc32

from opt_ops.core.decide.drills import drill_behind
from opt_ops.core.decide.evaluation import due, given_up
from opt_ops.core.decide.next_run import begun_data
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.scores import fallen
from opt_ops.core.events import AlertIntended, EvaluationEnded, Event
from opt_ops.core.failures.classes import row
from opt_ops.core.names import AlertTopic, alert_id
from opt_ops.core.state.in_place import in_sentences, joined
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.planned import OTHER_DATA, planned_changes
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.state.status import Status
from opt_ops.core.text import clock, count, duration
from opt_ops.core.told import told, words
from opt_ops.core.values import Action, AskDefault, Checkpoint, Driver, EvaluationEnd, Severity, Tier
from opt_ops.core.waiting import still_waiting

_UNKNOWN_SECONDS = 600.0  # of a job whose state is not known, before an operator is notified

_LOUDNESS = (Severity.INFO, Severity.WARNING, Severity.PAGE)


def alert(state: State, now: float, policy: Policy) -> Event | None:
    """The next alert to send, if any."""
    if policy.least_alert is None:
        return None
    least = _LOUDNESS.index(policy.least_alert)

    def news(alert: str, severity: Severity) -> bool:
        return _LOUDNESS.index(severity) >= least and alert not in state.alerts

    once = (_halted(state), _waiting(state, now, policy), _unknown(state, now), _ended(state, policy))
    first = (each for each in once if each is not None and news(each.alert, each.severity))
    others = (_proposals, _incidents, _signals, _other_data, _scores, _evaluations, _blind)
    return next(chain(first, *(each(state, news) for each in others)), None)


def _halted(state: State) -> AlertIntended | None:
    if state.status is not Status.HALTED:
        return None
    lineage = state.intent.lineage
    tried = [
        f"{i.name}, {words.failure(i.kind)}: {words.action(i.decision.action)}, {_ending(i)}"
        for i in list(state.incidents.values())[-8:]
        if i.decision
    ]
    why = words.without_codes(state.why)
    body = [why, "", "Tried:", *(tried or ["nothing"]), "", f"Next: opt-ops run explain {lineage}"]
    if state.driver is Driver.SHADOW:
        body.append("It is only watched: whoever runs this training must act.")
    else:
        body.append(f"Then: opt-ops run resume {lineage}, or opt-ops run rollback {lineage} --to STEP")
    return AlertIntended(
        alert=alert_id(lineage, AlertTopic.HALTED, state.since),
        severity=Severity.PAGE,
        title=f"opt-ops {lineage}: HALTED, a human is needed",
        body="\n".join(body),
    )


def _waiting(state: State, now: float, policy: Policy) -> AlertIntended | None:
    """A page: nothing is trained because nodes are missing, for longer than `page_seconds`."""
    attempt = state.attempt
    if state.ended or state.paused is not None or (attempt is not None and attempt.live) or state.run is None:
        return None
    # Not since the status changed: nodes that come and go again and again train nothing either.
    since = max(state.started_at, state.asked_at, attempt.ended_at or 0.0 if attempt else 0.0)
    lineage = state.intent.lineage
    if still_waiting(now, since, policy.capacity.page_seconds):
        return None
    asked = [f"{a.name}: {a.wanted} nodes, {a.reason or a.status}" for a in state.live_allocations]
    body = [f"No attempt has run for {(now - since) / 60:.0f} minutes.", *asked, f"Next: opt-ops node list {lineage}"]
    return AlertIntended(
        alert=alert_id(lineage, AlertTopic.WAITING, since),
        severity=Severity.PAGE,
        title=f"opt-ops {lineage}: {state.status}, waiting for nodes",
        body="\n".join(body),
    )


def _unknown(state: State, now: float) -> AlertIntended | None:
    """A warning: for minutes, the scheduler has not said anything about a job that is understood."""
    lineage = state.intent.lineage
    for allocation in state.live_allocations:
        since = allocation.unknown_since
        if since is None or still_waiting(now, since, _UNKNOWN_SECONDS):
            continue
        return AlertIntended(
            alert=alert_id(lineage, AlertTopic.JOB_UNKNOWN, since),
            severity=Severity.WARNING,
            title=f"opt-ops {lineage}: the state of job {allocation.job} is not known since {clock(since)}",
            body=f"{allocation.reason}\nNothing follows from it: opt-ops assumes what was known last.\n"
            f"next: squeue -j {allocation.job}; opt-ops run show {lineage}",
        )
    return None


def _ending(incident: Incident) -> str:
    if incident.closed_at is None:
        return "not over"
    return {True: "proven", False: "did not take effect", None: "not acted on"}[incident.proven]


_News = Callable[[str, Severity], bool]
"""Whether an alert of that name and severity is to be sent, and was not sent yet."""


def _incidents(state: State, news: _News) -> Iterator[AlertIntended]:
    for incident in state.incidents.values():
        if incident.decision is None or incident.decision.action is Action.HALT:
            continue
        if incident.proposal is not None and incident.decision.advice:
            continue  # a person was asked
        quiet = incident.drill is not None or row(incident.kind).quiet
        loud = Severity.PAGE if incident.decision.action is Action.NOTIFY else Severity.WARNING
        quiet = quiet or (incident.proven is True and joined(state, incident) is not None)
        severity = Severity.INFO if quiet and state.driver is not Driver.OPERATOR else loud
        if news(opened := alert_id(incident.name, AlertTopic.OPENED), severity):
            yield _opened(state, incident, opened, severity)
        if incident.fell_back and news(fell_back := alert_id(incident.name, AlertTopic.FELL_BACK), severity):
            yield _fell_back(state, incident, fell_back, severity)
        over = incident.closed_at is not None and incident.proven
        if over and news(closed := alert_id(incident.name, AlertTopic.CLOSED), Severity.INFO):
            yield _closed(state, incident, closed)


def _proposals(state: State, news: _News) -> Iterator[AlertIntended]:
    """A page for each open proposal: a person is asked."""
    for proposal in open_proposals(state):
        made, incident = proposal.made, state.incidents[proposal.made.incident]
        severity = Severity.PAGE if incident.drill is None else Severity.INFO
        if not news(alert := alert_id(made.proposal, AlertTopic.ASKED), severity):
            continue
        what = told(made.decided, state).partition(": ")[2]
        then = "it is done" if made.default is AskDefault.ACT else "it is not done"
        body = [
            *_found(incident),
            f"proposal: {what}: {words.without_codes(made.decided.why)}",
            f"deadline: {clock(made.deadline)}; without an answer, {then}",
            f"do it now: opt-ops run approve {made.proposal}",
            f"do not: opt-ops run decline {made.proposal}",
            f"next: opt-ops run explain {incident.name}",
        ]
        title = f"opt-ops {state.intent.lineage}: your answer is needed: {words.without_codes(incident.cause)}"
        yield AlertIntended(alert=alert, severity=severity, title=title, body="\n".join(body))


def _opened(state: State, incident: Incident, alert: str, severity: Severity) -> AlertIntended:
    decision = incident.decision
    assert decision is not None
    body = [
        *_found(incident),
        f"action: {told(decision, state).partition(': ')[2]}",
        f"why: {words.without_codes(decision.why)}",
        *_data_taken_back(state, incident),
        f"next: opt-ops run explain {state.intent.lineage}",
    ]
    return AlertIntended(
        alert=alert,
        severity=severity,
        title=f"opt-ops {state.intent.lineage}: {words.without_codes(incident.cause)}",
        body="\n".join(body),
    )


def _data_taken_back(state: State, incident: Incident) -> list[str]:
    """That a rollback takes a change of the data back with it: whoever asked for the change must ask again."""
    decision, hit = incident.decision, state.attempts.get(incident.attempt or "")
    if decision is None or decision.action is not Action.ROLLBACK or hit is None:
        return []
    change = state.changes.get(str(incident.evidence.get("request")))
    step = decision.checkpoint.step if decision.checkpoint else 0
    run = state.runs[hit.run]
    kept = begun_data(state, run, step)
    gone = [each.step for each in run.data if each not in kept]
    if not gone or (change is not None and change.keep_later):
        return []
    again = f"`opt-ops run set {state.intent.lineage} --data …` changes it again"
    return [f"data: that of before step {min(gone):,} is trained on again; {again}"]


def _found(incident: Incident) -> list[str]:
    return [_what(incident), f"evidence: {words.without_codes(incident.detector)}", *_likely(incident)]


def _what(incident: Incident) -> str:
    """`12-i003, bad GPU: n2: a GPU has fallen off the bus (Xid 79) (DRILL d002)`."""
    drill = f" (DRILL {incident.drill})" if incident.drill else ""
    return f"{incident.name}, {words.failure(incident.kind)}: {words.without_codes(incident.cause)}{drill}"


def _fell_back(state: State, incident: Incident, alert: str, severity: Severity) -> AlertIntended:
    return AlertIntended(
        alert=alert,
        severity=severity,
        title=f"opt-ops {state.intent.lineage}: {incident.name} is not recovered in place",
        body=f"{in_sentences(state, incident)}\nnext: opt-ops run explain {state.intent.lineage}",
    )


def _likely(incident: Incident) -> list[str]:
    """The likeliest cause, with its confidence and first evidence."""
    if not incident.causes:
        return []
    first = incident.causes[0]
    why = f": {first.evidence_for[0]}" if first.evidence_for else ""
    return [f"likely cause: {words.cause(first.cause)} ({first.confidence:.0%}){why}"]


def _closed(state: State, incident: Incident, alert: str) -> AlertIntended:
    lost = f"{count(incident.steps_lost or 0, 'step')} lost, {duration(incident.seconds_down or 0.0)} down"
    became = in_sentences(state, incident)
    how = "recovered in place, proven" if joined(state, incident) is not None else "over, proven"
    return AlertIntended(
        alert=alert,
        severity=Severity.INFO,
        title=f"opt-ops {state.intent.lineage}: {incident.name} is {how}",
        body="\n".join(filter(None, (_what(incident), became, lost))),
    )


def _signals(state: State, news: _News) -> Iterator[AlertIntended]:
    for key, signal in state.signals.items():
        alert = alert_id(state.intent.lineage, key)
        if signal.tier is not Tier.ALERT:
            continue
        severity = Severity.WARNING if drill_behind(state, signal) is None else Severity.INFO
        if news(alert, severity):
            yield AlertIntended(
                alert=alert,
                severity=severity,
                title=f"opt-ops {state.intent.lineage}: {words.failure(signal.signal)} at step {signal.step}",
                body=f"{told(signal)}\nNothing was touched.\nnext: opt-ops run show {state.intent.lineage}",
            )


def _other_data(state: State, news: _News) -> Iterator[AlertIntended]:
    """A warning: a file of the data is missing or changed, and training went on without a word from anybody."""
    attempt, digests = state.attempt, {each.data for each in state.attempts.values()} - {None}
    if attempt is None or attempt.data is None or len(digests) < 2:
        return
    lineage, start = state.intent.lineage, attempt.checkpoint.step if attempt.checkpoint else 0
    changed_here = [each.what for each in planned_changes(state) if each.step == start + 1]
    alert = alert_id(lineage, f"{AlertTopic.OTHER_DATA}/{start}/{crc32(attempt.data.encode()):08x}")
    if changed_here == [OTHER_DATA] and news(alert, Severity.WARNING):
        yield AlertIntended(
            alert=alert,
            severity=Severity.WARNING,
            title=f"opt-ops {lineage}: it trains on other data than before step {start:,}",
            body=f"{attempt.name} says another digest of its data, and nobody asked for that: a file may be missing or "
            "changed.\nTraining goes on, and the loss detectors learn the new data.\n"
            f"If that is wrong: give the files back, then opt-ops run rollback {lineage} --to {start}\n"
            f"next: opt-ops run show {lineage}",
        )


def _scores(state: State, news: _News) -> Iterator[AlertIntended]:
    return (each for each in fallen(state) if news(each.alert, each.severity))


def _evaluations(state: State, news: _News) -> Iterator[AlertIntended]:
    """A warning for each checkpoint whose evaluation is not tried again."""
    for each in given_up(state):
        lineage, of, end = state.intent.lineage, each.intended.checkpoint, each.end or EvaluationEnd.FAILED
        if news(alert := alert_id(lineage, f"{AlertTopic.EVALUATION}/{of.run}/{of.step}"), Severity.WARNING):
            yield AlertIntended(
                alert=alert,
                severity=Severity.WARNING,
                title=f"opt-ops {lineage}: the checkpoint of step {of.step:,} is not evaluated",
                body=f"{told(EvaluationEnded(evaluation=each.name, end=end, why=each.why))}\n"
                f"It is not tried again. Training goes on.\nnext: {_by_hand(of, each.intended.tasks)}",
            )


def _by_hand(checkpoint: Checkpoint, tasks: Sequence[str]) -> str:
    """The command that evaluates a checkpoint."""
    return f"opt-ops ckpt evaluate {checkpoint.run}/{checkpoint.step} --tasks {','.join(tasks) or 'NAME'}"


def _blind(state: State, news: _News) -> Iterator[AlertIntended]:
    """A page for each part of the watch that fails, and for each file of which most is left out."""
    lineage = state.intent.lineage
    following = f"next: opt-ops run show {lineage}"
    for part, failing in state.failing.items():
        if news(alert := alert_id(lineage, f"{AlertTopic.BLIND}/{part}", failing.since), Severity.PAGE):
            yield AlertIntended(
                alert=alert,
                severity=Severity.PAGE,
                title=f"opt-ops {lineage}: a part of the watch fails: {part}",
                body=f"{failing.why}\nIt is skipped, the others go on. The daemon's log says more.\n{following}",
            )
    for key, left_out in state.left_out.items():
        if left_out.most and news(alert := alert_id(lineage, f"{AlertTopic.BLIND}/{key}"), Severity.PAGE):
            yield AlertIntended(
                alert=alert,
                severity=Severity.PAGE,
                title=f"opt-ops {lineage}: most of {left_out.file} is left out: it has another format",
                body=f"{left_out.count} records are not what docs/formats.md says, {left_out.taken} are.\n"
                f"first: {left_out.first}\nnewest: {left_out.newest}\n{following}",
            )


def _ended(state: State, policy: Policy) -> AlertIntended | None:
    if state.status not in (Status.COMPLETED, Status.CANCELLED):
        return None
    body = [state.why or "every step is trained"]
    if state.status is Status.CANCELLED:  # that of a completed lineage is evaluated
        newest = due(state, policy.evaluation)[:1]
        body += [f"not evaluated: {_by_hand(each.checkpoint, policy.evaluation.tasks)}" for each in newest]
    return AlertIntended(
        alert=alert_id(state.intent.lineage, state.status),
        severity=Severity.INFO,
        title=f"opt-ops {state.intent.lineage}: {state.status}",
        body="\n".join(body),
    )
