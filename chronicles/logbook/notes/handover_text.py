"""The handover in Markdown: at most 400 words beside what people wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chronicles.logbook.drawing.markup import plain
from chronicles.logbook.front_page import ASK_MODE, known_status, lead
from chronicles.logbook.notes import happened
from chronicles.logbook.notes.handover import Handover, paused_soon
from chronicles.logbook.notes.happened import Happening
from chronicles.logbook.open_questions import drill_mark, to_watch
from chronicles.wording import count, duration, minute, names, short, uncapitalized, whole
from opt_ops.core.failures.classes import title
from opt_ops.core.state.planned import planned_changes
from opt_ops.core.told.words import reason
from opt_ops.core.values import Driver

WORDS = 400  # beside quotations
_FRAME = 25  # words of the heading and of the line about what is left out
_SHOWN = 6  # lines of one sort
_RECENT = 60.0  # seconds: data that is younger is told to the second

_DRIVES = {
    Driver.DAEMON: "opt-ops drives.",
    Driver.OPERATOR: "An operator drives: opt-ops watches and advises.",
    Driver.ASK: ASK_MODE,
    Driver.SHADOW: "Only watched (shadow mode): another launcher runs the training.",
}


def handover_text(note: Handover) -> str:
    """The note. Of many entries the oldest ones are left out first, those that are large last."""
    head = [f"# Lineage {plain(note.lineage)}: handover, {minute(note.as_of)}", ""]
    before = [*head, *_now(note), *_section("Needs you", note.needs_you), *_section("Tonight", list(_tonight(note)))]
    after = [*_section("To watch", list(_to_watch(note))), *_afterthoughts(note)]
    left = WORDS - _FRAME - len(" ".join([*before, *after]).split())
    return "\n".join([*before, *_happened(note, left), *after]).rstrip() + "\n"


def _section(name: str, sentences: Sequence[str]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield from [f"- {plain(sentence)}" for sentence in sentences[:_SHOWN]] or ["Nothing."]
    if len(sentences) > _SHOWN:
        yield f"- And {whole(len(sentences) - _SHOWN)} more in the logbook."
    yield ""


def _now(note: Handover) -> Iterator[str]:
    report, live = note.report, note.live
    yield "## Now"
    yield ""
    doubtful = live is not None and live.status != str(note.state)
    if live is not None and doubtful:
        yield f"**{plain(live.status)}**: {plain(live.why)}"
        yield ""
    known = "" if doubtful else f"**{known_status(report)}.** "
    at = f"Run {report.runs[-1].run}, step {whole(note.step)} of {whole(note.steps)}. " if report.runs else ""
    data = f"The newest step is {_age(note.data_age_seconds)} old. " if note.data_age_seconds is not None else ""
    yield f"{known}{at}{'' if report.ended else data}{_watches(note)}".rstrip()
    yield plain(_end(note) or lead(report))
    if note.evaluation:
        yield plain(note.evaluation)
    yield ""


def _age(seconds: float) -> str:
    return duration(seconds) if seconds < _RECENT else duration(60 * round(seconds / 60))


def _watches(note: Handover) -> str:
    if note.report.ended:
        return ""
    live = note.live
    who = f"The daemon watches ({plain(live.watcher)}). " if live and live.watched and live.watcher else ""
    return f"{who}{'Nobody watches. ' if live and live.watched is False else ''}{_DRIVES[note.driver]}"


def _end(note: Handover) -> str:
    end, pace = note.expected_end, note.pace
    if end is None or pace is None:
        return ""
    by = f"{pace.seconds:.3g} s a step over the last {count(pace.steps, 'step')}, saves included"
    if minute(end.earliest) == minute(end.latest):
        return f"Expected end without a stop: {minute(end.latest)} ({by})."
    return f"Expected end without a stop: between {minute(end.earliest)} and {minute(end.latest)} ({by})."


def _tonight(note: Handover) -> Iterator[str]:
    state, report = note.record.state, note.report
    if report.ended:
        return
    for limit in note.time_limits:
        yield f"Job {limit.job} reaches its time limit at {minute(limit.at)}."
    attempt = state.attempt
    if attempt is not None and attempt.live and attempt.nodes:
        asked = f"; {count(note.nodes_asked_for, 'node')} asked for" if note.nodes_asked_for else ""
        yield f"{count(len(attempt.nodes), 'node')} in use, {count(note.spares_held, 'spare')}{asked}."
    elif note.nodes_asked_for:
        yield f"{count(note.nodes_asked_for, 'node')} asked for, {count(note.spares_held, 'node')} held."
    for budget in note.budgets:
        kind = "" if budget.kind in ("", budget.playbook) else f" for {uncapitalized(title(budget.kind))}"
        yield f"Retry budget {budget.playbook}{kind}: {budget.left} of {budget.of} left until {minute(budget.until)}."
    if note.lr_scale != 1:
        changes = count(len(report.runs) - 1, "change")
        yield f"The learning rate is the schedule's × {note.lr_scale:.3g}, after {changes}."
    good = [row.step for row in report.checkpoints if row.verified and row.healthy]
    if good:
        yield f"The newest good checkpoint is that of step {whole(good[-1])}, {_back(note.step - good[-1])} back."
    if paused_soon(note) and report.paused is not None:
        nodes = "kept" if report.paused.keep_nodes else "released"
        yield f"{report.paused.author} asked for a pause: it begins after one more checkpoint, the nodes are {nodes}."
    for change in planned_changes(state):
        if change.step > note.step:
            yield f"From step {whole(change.step)} on it is planned: {short(change.what or 'a change', 120)}."
    for node in note.retests:
        yield f"{node} waits for a test: opt-ops node allow {note.lineage} {node} --retest."


def _back(steps: int) -> str:
    return count(max(0, steps), "step")


def _to_watch(note: Handover) -> Iterator[str]:
    report, state = note.report, note.record.state
    for alert in note.alerts_open:
        at = f" at step {whole(alert.step)}" if alert.step is not None else ""
        what = f"alert without an action: {uncapitalized(title(alert.signal))}{at}"
        yield f"{drill_mark(alert.drill)}{what}, {duration(alert.age_seconds)} ago."
    yield from to_watch(report)
    for node in report.nodes:
        if node.node in note.suspects:
            yield f"{drill_mark(node.drill)}{node.node} is suspect: {reason(node.reason)}."
        elif node.reason == "disk_low":
            yield f"The disk of the run folder is nearly full, as {node.node} sees it."
    unproven = [name for name in note.retests if state.nodes[name].drill is None]
    if unproven:
        yield f"Excluded without proof: {names(unproven)}."
    refused = [row.step for row in report.checkpoints if row.verified is False]
    if refused:
        yield f"{count(len(refused), 'checkpoint')} refused as damaged, the newest at step {whole(refused[-1])}."


def _afterthoughts(note: Handover) -> Iterator[str]:
    found = [f"{each.anchor}: {each.text}{f' Next: {each.next}' if each.next else ''}" for each in note.afterthoughts]
    yield from _section("Afterthoughts", found)


def _happened(note: Handover, words: int) -> Iterator[str]:
    yield f"## What happened in the last {note.hours:g} hours"
    yield ""
    kept = _within(note.happened, words)
    left = len(note.happened) - len(kept)
    if left:
        yield f"- {whole(left)} more, smaller or older, in the logbook: `opt-ops logbook open {plain(note.lineage)}`"
    yield from happened.lines(kept)
    if not note.happened:
        yield "Nothing happened."
    yield ""


def _within(found: Sequence[Happening], words: int) -> list[Happening]:
    """The newest large ones, then the newest others, in so many words. What a person wrote is never left out."""
    ranked = sorted(found, key=lambda each: (each.quote is None, not each.large, -each.at))
    kept: list[Happening] = []
    for each in ranked:
        words -= len(next(happened.lines([each])).split())
        if words < 0 and each.quote is None:
            break
        kept.append(each)
    return sorted(kept, key=lambda each: each.at)
