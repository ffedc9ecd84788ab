"""The entry of an incident: title, cause, evidence, decision, what changed, cost and proof."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chronicles import wording
from chronicles.logbook.entries.asked import asked
from chronicles.logbook.entries.entry import Fact, StackRow, Trial
from chronicles.logbook.entries.proof_words import ended_before, how_ended, proof_of
from chronicles.operators import batches, change, changed_settings, request_behind
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, StacksReport
from chronicles.wording import count, duration, evidence, full, names, second, short, uncapitalized, whole
from opt_ops.core.failures import classes
from opt_ops.core.failures.causes import Suspicion
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.data import changes_of
from opt_ops.core.text import number_spans
from opt_ops.core.values import Action, Tier

_TENSES = {"restarted": "replaced", "restarting": "replacing"}

_VERBS = {
    Action.RESTART: "start the next attempt from the newest good checkpoint",
    Action.EXCLUDE: "exclude the node and let training continue",
    Action.ADOPT: "take over the running attempt",
    Action.NOTIFY: "let training continue and page on-call",
    Action.HALT: "stop and page on-call",
    Action.COMPLETE: "complete the lineage: every step is trained",
}


def title(record: LineageRecord, row: IncidentReport) -> str:
    """What was done, then why."""
    if row.action is None:
        return f"incident open: {short(row.cause)}"
    if row.advisory and row.action != Action.ADOPT:
        return f"would have {_outcome_phrase(record, row, 'restarted', 'rolled back', 'changed')} (advisory)"
    if row.closed is not None:
        text = _outcome_phrase(record, row, "restarted", "rolled back", "changed")
    else:
        text = _outcome_phrase(record, row, "restarting", "rolling back", "changing")
    return f"{text}, NOT PROVEN" if row.proven is False else text


def _outcome_phrase(record: LineageRecord, row: IncidentReport, restarted: str, rolled_back: str, changed: str) -> str:
    """The title, with its verbs in a given tense."""
    named = ", ".join(row.nodes)
    cause = short(row.cause.removeprefix(named).lstrip(": ") if named else row.cause)
    match row.action:
        case Action.ROLLBACK:
            return _rolled_back(record, row, rolled_back)
        case Action.RECONFIGURE:
            return _reconfigured(record, row, changed)
        case Action.REPLACE_RANKS:
            verb = _TENSES[restarted]
            return f"{verb} {in_place.ranks(row.ranks_replaced)} in place: {short(row.cause)}"
        case Action.RESTART if row.planned and not row.advisory:
            return _moved(record, row)
        case Action.RESTART if row.excluded:
            return f"{restarted} without {names(row.excluded)}: {cause}"
        case Action.RESTART:
            return f"{restarted}: {short(row.cause)}"
        case Action.EXCLUDE if row.advisory:
            return f"excluded {names(row.nodes)}: {cause}"
        case Action.EXCLUDE:
            return f"excluded {names(row.nodes)}, training continued: {cause}"
        case Action.ADOPT:
            return "daemon restarted, training continued"
        case Action.NOTIFY:
            return f"paged on-call, training continued: {cause}"
        case Action.COMPLETE:
            return f"completed, nothing was started again: {short(row.cause)}"
        case _:
            return f"halted: {short(row.cause)}"


def _reconfigured(record: LineageRecord, row: IncidentReport, changed: str) -> str:
    """`changed: learning rate × 0.75`; `data changed at step 61,000: + code 10 %`."""
    others = ", ".join(_changed(record, row))
    run = _run_after(record, row)
    request = request_behind(record, row.evidence)
    if request is None or not request.data:
        return f"{changed}: {others or 'nothing'}"
    if run is None:
        return ", ".join(filter(None, [f"{changed} the data", others]))
    step, what = changes_of(record.state, run)[-1] if run.data[-1].step else (0, "from the first step on")
    return ", ".join(filter(None, [f"data {changed} at step {whole(step)}: {what}", others]))


def _rolled_back(record: LineageRecord, row: IncidentReport, rolled_back: str) -> str:
    """`rolled back 104 steps to step 28486, learning rate × 0.75: loss spike at step 28590`."""
    steps = f" {count(row.steps_discarded, 'step')}" if row.steps_discarded else ""
    where = f"step {whole(row.checkpoint_step)}" if row.checkpoint_step else "the start"
    what = ", ".join([f"{rolled_back}{steps} to {where}", *_changed(record, row)])
    if row.requested:
        return what  # the quoted reason follows
    at = f" at step {whole(row.step_failed)}" if row.step_failed is not None else ""
    return f"{what}: {uncapitalized(classes.title(row.kind))}{at}"


def _moved(record: LineageRecord, row: IncidentReport) -> str:
    """A planned move. Nothing has failed, and the title must not suggest it."""
    before, after = (record.state.attempts.get(name or "") for name in (row.attempt, row.next_attempt))
    if row.kind != FailureClass.NODES_RETURNED:
        reason = uncapitalized(classes.title(row.kind))
        return f"{'moved' if after else 'moving'} to other nodes: {reason}"
    if before is None or after is None:
        return "growing to more nodes"
    return f"grew from {len(before.nodes)} to {count(len(after.nodes), 'node')}"


def _changed(record: LineageRecord, row: IncidentReport) -> list[str]:
    request = request_behind(record, row.evidence)
    changed = changed_settings(request.lr if request else None, row.lr_factor, row.settings, row.skip_batches)
    run = _run_after(record, row)
    parent = record.state.runs.get(run.parent or "") if run else None
    gone = [each.step for each in parent.data if run and each not in run.data] if parent else []
    if gone and row.action == Action.ROLLBACK:
        changed.append(f"data of before step {whole(min(gone))}")
    return changed


def _run_after(record: LineageRecord, row: IncidentReport) -> Run | None:
    """The run that was planned for an incident; None: none was."""
    return next((run for run in record.state.runs.values() if run.incident == row.incident), None)


def is_notable(row: IncidentReport) -> bool:
    """Whether a progress note mentions it: settings have changed, or training halted."""
    return row.action in (Action.ROLLBACK, Action.RECONFIGURE, Action.HALT) and not row.advisory


def facts(record: LineageRecord, row: IncidentReport) -> Iterator[Fact]:
    """Everything there is to say, in order."""
    yield from _drill(record, row)
    yield from _finding(record, row)
    if row.probes:
        yield Fact(label="Experiment", text=_experiment(row))
    if row.stacks:
        yield Fact(label="Stacks", text=_stacks(row.stacks))
    if row.proposals:
        yield Fact(label="Asked", text=asked(row))
    yield from _decision(record, row)
    if row.what_became:
        yield Fact(label="In place", text=row.what_became)
    if row.ends_attempt:
        yield Fact(label="Resumed", text=_resumed(record, row))
    if row.stops_training:
        yield Fact(label="Cost", text=_cost(record, row))
    if row.action not in (None, Action.HALT, Action.NOTIFY) and not row.advisory:
        yield Fact(label="Proof", text=proof_of(record, row))
    for later in row.afterthoughts:
        yield Fact(label="Afterthought", text=f"{second(later.at)}: {full(later.text)}")
    if row.notified_at is not None:
        yield Fact(label="Notified", text=f"On-call was notified at {second(row.notified_at)}.")


def _finding(record: LineageRecord, row: IncidentReport) -> Iterator[Fact]:
    request = request_behind(record, row.evidence)
    if request is not None:
        yield Fact(label="Requested", text=f"{full(change(request))}{_hit(row, harmed=False)}")
        return
    harmed = row.action != Action.ADOPT and not row.planned
    cause = f"{full(row.cause_in_words, keep=row.nodes)}{_hit(row, harmed)}"
    yield Fact(label="Cause", text=cause)
    yield Fact(label="Confidence", text=f"{row.confidence.capitalize()}: {row.confidence_why}.")
    if row.causes:
        yield Fact(label="Likely causes", text=_causes(row.causes))
    measured, line = evidence(row.evidence)
    parts = (row.detector, measured, _alerts_before(record, row))
    yield Fact(label="Evidence", text=" ".join(full(part) for part in parts if part), line=line)
    if row.documents_command:
        yield Fact(label="Data", text=f"To see the documents of the step where it began: {row.documents_command}")


_LIKELY = 3  # causes that an entry names; report.json has all of them


def _causes(causes: Sequence[Suspicion]) -> str:
    """The likeliest causes, each with its confidence and with the evidence for and against it."""
    return " ".join(
        f"{each.cause} {each.confidence:.0%}: for it: {'; '.join(each.evidence_for)}."
        + (f" Against it: {'; '.join(each.evidence_against)}." if each.evidence_against else "")
        for each in causes[:_LIKELY]
    )


def _hit(row: IncidentReport, harmed: bool) -> str:
    """Which attempt it met, and where."""
    if not row.attempt:
        return ""
    subject = f" It hit attempt {row.attempt}" if harmed else f" Attempt {row.attempt} was"
    if row.step_failed is None:
        return f"{subject} before its first step."
    later = row.last_step is not None and row.last_step > row.step_failed
    end = (
        f", which continued to step {whole(row.last_step)}" if harmed else f", and continued to {whole(row.last_step)}"
    )
    return f"{subject} at step {whole(row.step_failed)}{end if later else ''}."


def _decision(record: LineageRecord, row: IncidentReport) -> Iterator[Fact]:
    if row.action is None or row.playbook is None:
        yield Fact(label="Decision", text="None yet.")
        return
    if request_behind(record, row.evidence) is not None:
        return  # the request is the decision
    playbook, version = row.playbook.rsplit("/", 1)
    meant = f" for {row.for_cause}" if row.for_cause else ""
    book = f"Playbook {playbook} ({version}), rung {row.rung}{meant}"
    why = full(f"Why: {row.why}")
    if row.advisory:
        why_not = "." if row.proposals else ", because an operator drove."
        advice = f"{book} advised to {_verb(record, row)}. Nothing was done{why_not}"
        yield Fact(label="Advice", text=f"{advice} {why}")
    else:
        yield Fact(label="Decision", text=f"{full(f'{book}: {_verb(record, row)}')} {why}")


_SHOWED = {True: "spiked", False: "did not spike", None: "no verdict"}


def _experiment(row: IncidentReport) -> str:
    """What probes were made, and which stayed in the band."""
    calm = [each.probe for each in row.probes if each.spiked is False]
    best = f"{' and '.join(calm)} stayed in the band." if calm else "None of them stayed in the band."
    runs = count(len(row.probes), "short run")
    return f"Before the decision, {runs} on idle nodes began before the onset and trained past it. {best}"


def trials(row: IncidentReport) -> list[Trial]:
    """The probes as a table."""
    return [Trial(each.probe, each.node, _SHOWED[each.spiked], full(each.why)) for each in row.probes]


def _stacks(taken: StacksReport) -> str:
    where = f" (on {wording.nodes(taken.nodes)})" if taken.nodes else ""
    text = "The stacks of all ranks were taken."
    if taken.odd:
        text += f" {_ranks(taken.odd)}{where} {'is' if len(taken.odd) == 1 else 'are'} not where the others are."
    else:
        text += " No rank clearly differs from the others."
    return f"{text} {_ranks(taken.silent)} did not answer." if taken.silent else text


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'Rank' if len(numbers) == 1 else 'Ranks'} {number_spans(numbers)}"


_FRAMES = 3  # the innermost: what a rank waits in, and for whom; report.json has all of them


def stacks(row: IncidentReport) -> list[StackRow]:
    """The ranks of a hang by their innermost frames."""
    taken = row.stacks
    if not taken:
        return []
    odd = set(taken.odd)
    rows = [
        StackRow(
            ranks=number_spans(group.ranks),
            frames=" ← ".join(short(frame, 60) for frame in group.frames[:_FRAMES]),
            odd=not odd.isdisjoint(group.ranks),
        )
        for group in taken.groups
    ]
    if taken.silent:
        rows.append(StackRow(number_spans(taken.silent), "no answer", not odd.isdisjoint(taken.silent)))
    return rows


def spans(row: IncidentReport) -> list[tuple[str, float]]:
    """The parts of the downtime, in order: (what for, seconds)."""
    known = (
        ("to detect", row.seconds_to_see),
        ("to decide", row.seconds_to_decide),
        ("to order the new ranks" if row.in_place else "to relaunch", row.seconds_to_relaunch),
        ("to the first step", row.seconds_to_first_step),
    )
    return [(label, seconds) for label, seconds in known if seconds is not None]


def _drill(record: LineageRecord, row: IncidentReport) -> Iterator[Fact]:
    drill = record.state.drills.get(row.drill or "")
    if drill is not None:
        what = wording.drill(drill.fault, drill.arguments)
        yield Fact(label="Drill", text=f"Injected by {drill.author} at {second(drill.at)} as {drill.name}: {what}.")


def _verb(record: LineageRecord, row: IncidentReport) -> str:
    if row.action == Action.ROLLBACK:
        where = f"step {whole(row.checkpoint_step)}" if row.checkpoint_step else "the start"
        factor = f" and multiply the learning rate by {row.lr_factor:g}" if row.lr_factor else ""
        more = f" and skip {batches(row.skip_batches)}" if row.skip_batches else ""
        return f"roll back to {where}{factor}{more}"
    if row.action == Action.RECONFIGURE:
        return f"continue with {', '.join(_changed(record, row))}"
    if row.action == Action.REPLACE_RANKS:
        return f"replace {in_place.ranks(row.ranks_replaced)} while all others keep running"
    verb = _VERBS[row.action] if row.action else ""
    return ("save one more checkpoint, then " if row.save_first else "") + verb


def _alerts_before(record: LineageRecord, row: IncidentReport) -> str:
    """The alerts on the same attempt that preceded the incident."""
    if row.onset_step is None:
        return ""
    steps = [
        signal.step
        for signal in record.state.signals.values()
        if signal.tier is Tier.ALERT
        and signal.attempt == row.attempt
        and signal.step is not None
        and preceded_by(row, signal.step)
    ]
    which = "An alert" if len(steps) == 1 else "Alerts"
    return f"{which} preceded it, at step {', '.join(map(whole, steps))}; no action followed" if steps else ""


_LEAD = 64  # steps: the gradient norm leaves its band before the loss does


def preceded_by(row: IncidentReport, step: int | None) -> bool:
    """Whether an alert at this step, of any attempt, was the beginning of the incident."""
    first, last = row.onset_step, row.step_failed
    return step is not None and first is not None and last is not None and first - _LEAD <= step <= last


def _resumed(record: LineageRecord, row: IncidentReport) -> str:
    step = row.checkpoint_step
    if not step and not row.next_attempt and row.action != Action.ROLLBACK:
        return f"No: the lineage was {how_ended(record)} first." if record.state.ended else "Not yet."
    text = f"From the checkpoint of step {whole(step)}" if step else "From scratch, because there was no checkpoint"
    if not step and record.state.intent.init_from:
        text += f", with the weights of {record.state.intent.init_from}"
    if row.next_attempt:
        nodes = record.state.attempts[row.next_attempt].nodes
        text += f", as attempt {row.next_attempt} on {wording.nodes(nodes)}"
    if row.onset_step is not None and row.action == Action.ROLLBACK and (refused := _not_chosen(record, row)):
        text += f". Newer checkpoints that were not chosen: {refused}"
    return f"{text}."


def _not_chosen(record: LineageRecord, row: IncidentReport) -> str:
    """The newer checkpoints of the run before, and why they were not chosen."""
    reasons: dict[str, list[int]] = {}
    near = f"too near the onset at {whole(row.onset_step)}"
    for known in record.state.checkpoints.values():
        step = known.checkpoint.step
        newer = (row.checkpoint_step or 0) < step <= (row.last_step or row.step_failed or 0)
        if known.checkpoint.run != row.run_before or not newer or known.seen_at > row.opened:
            continue
        reasons.setdefault(near if known.good else known.why or "not verified", []).append(step)
    return "; ".join(f"{_listed(steps)} ({why})" for why, steps in reasons.items())


_FEW = 4  # checkpoints that are listed one by one


def _listed(steps: Sequence[int]) -> str:
    if len(steps) <= _FEW:
        return ", ".join(map(whole, steps))
    return f"{len(steps)} from {whole(steps[0])} to {whole(steps[-1])}"


def _cost(record: LineageRecord, row: IncidentReport) -> str:
    if row.steps_discarded is None:
        return ended_before(record) if record.state.ended else "Not known yet."
    resumed, discarded = row.step_resumed, row.steps_discarded
    which = f" ({_span(resumed + 1, resumed + discarded)})" if resumed is not None and discarded else ""
    hours = f", {wording.hours(row.node_hours_lost)} node-hours" if row.node_hours_lost else ""
    return f"{count(discarded, 'step')} discarded{which}, {duration(row.seconds_down)} of downtime{hours}."


def _span(first: int, last: int) -> str:
    return whole(first) if first == last else f"{whole(first)} to {whole(last)}"
