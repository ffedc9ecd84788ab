"""Sentences of findings, incidents, decisions, nodes and alerts, and of how a lineage ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from opt_ops.core import events as e
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state import in_place
from opt_ops.core.state.model import State
from opt_ops.core.text import duration
from opt_ops.core.told import words
from opt_ops.core.told.phrase import (
    Forms,
    acts,
    after,
    because,
    count,
    figure,
    hour,
    listed,
    name,
    number_in,
    plain,
    quoted,
    seen,
)
from opt_ops.core.values import Action, AskDefault, Tier, Verdict

_LEVELS = frozenset({FailureClass.LOSS_SPIKE, FailureClass.LOSS_DRIFT})


def _signal(event: e.SignalRaised, known: State | None) -> Forms:
    since = f" since step {event.onset_step:,}" if event.onset_step is not None else ""
    where = f" on {listed(event.nodes)}" if event.nodes else ""
    found = f"{words.failure(event.signal)}{since}{where}: {_found(event)}"
    return Forms(found, "see", found)


def _found(event: e.SignalRaised) -> str:
    loss, limit = number_in(event.evidence, "loss"), number_in(event.evidence, "limit")
    if event.signal not in _LEVELS or loss is None or limit is None:
        return plain(event.rule)
    steps = event.step - event.onset_step if event.step is not None and event.onset_step is not None else None
    healed = f"not healed in {count(steps, 'step')}" if steps is not None else "not healed"
    return f"{figure(loss)}, usually below {figure(limit)}; {'watching' if event.tier is Tier.ALERT else healed}"


_VERDICTS = {
    Verdict.HEALTHY: "is healthy",
    Verdict.SUSPECT: "is suspect",
    Verdict.BAD: "is bad",
    Verdict.UNKNOWN: "cannot be judged",
}


def _judged(event: e.NodeJudged, known: State | None) -> Forms:
    why = f": {words.reason(plain(event.reason))}" if event.reason not in ("", "ok") else ""
    return seen(f"{name(event.node)} {_VERDICTS[event.verdict]}{why}{_drill(event.drill)}")


def _drill(drill: str | None) -> str:
    return f" (DRILL {name(drill)})" if drill else ""


def _opened(event: e.IncidentOpened, known: State | None) -> Forms:
    if event.failure == FailureClass.OPERATOR:
        author, _, reason = event.cause.partition(": ")
        what = f"{name(event.incident)}, asked for by {name(author)}{after(': ', reason)}"
        return Forms(what, "take up", what)
    what = f"{name(event.incident)}, {words.failure(event.failure)}: {plain(event.cause)}{_drill(event.drill)}"
    return Forms(what, "open", what)


def _decided(event: e.RecoveryDecided, known: State | None) -> Forms:
    wish = event.playbook == FailureClass.OPERATOR
    page = "as asked" if wish else f"{words.failure(event.playbook)}, rung {event.rung + 1:,}"
    what = ", ".join([_what(event), *_changes(event)])
    advice = "advises: " if event.advice else ""
    return Forms(
        f"{name(event.incident)}: {advice}{what} ({page})", "decide", f"{name(event.incident)}: {what} ({page})"
    )


def _proposed(event: e.ProposalMade, known: State | None) -> Forms:
    what = ", ".join([_what(event.decided), *_changes(event.decided)])
    then = "done" if event.default is AskDefault.ACT else "not done"
    rest = f"a person until {hour(event.deadline)}: {what} ({name(event.proposal)}; {then} without an answer)"
    return Forms(f"asks {rest}", "ask", rest)


def _answered(event: e.ProposalAnswered, known: State | None) -> Forms:
    by = f" by {name(event.author)}" if event.author is not None else ""
    what = f"{name(event.proposal)} is {event.status}{by}"
    return seen(f"{what}{after(': ', event.reason) if event.author else because(event.reason)}")


def _what(event: e.RecoveryDecided) -> str:
    match event.action:
        case Action.REPLACE_RANKS:
            return f"replace {in_place.ranks(event.ranks)} while all others keep running"
        case Action.ROLLBACK:
            return f"back to step {event.checkpoint.step:,}" if event.checkpoint else "back to the start"
        case Action.EXCLUDE if event.exclude:
            return f"exclude {listed(event.exclude)}, training goes on"
        case Action.RESTART if event.exclude:
            return f"restart without {listed(event.exclude)}"
        case _:
            return words.action(event.action)


def _changes(event: e.RecoveryDecided) -> list[str]:
    return [
        *([f"learning rate × {figure(event.lr_factor)}"] if event.lr_factor is not None else []),
        *map(name, event.settings[:3]),
        *([f"{count(event.skip_batches, 'batch', 'batches')} left out"] if event.skip_batches else []),
    ]


def _afterthought(event: e.AfterthoughtAdded, known: State | None) -> Forms:
    return Forms(
        f"{name(event.incident)}, later: {plain(event.text)}", "add", f"to {name(event.incident)}: {plain(event.text)}"
    )


def _excluded(event: e.NodeExcluded, known: State | None) -> Forms:
    node = name(event.node)
    if event.author is not None:
        return Forms(f"{name(event.author)} excludes {node}{after(': ', event.reason)}", "exclude", node)
    code = event.reason.rpartition(": ")[2]
    why = f"{words.reason(plain(code))}, {name(event.incident)}"
    return Forms(f"{node} is excluded: {why}", "exclude", f"{node}: {why}")


def _drain(event: e.DrainIntended, known: State | None) -> Forms:
    return acts("ask", f"Slurm to drain {name(event.node)}")


def _drained(event: e.NodeDrained, known: State | None) -> Forms:
    if event.done:
        return seen(f"{name(event.node)} is drained")
    why = because(event.why, longest=80)
    return seen(f"{name(event.node)} could not be drained{why}; it stays excluded all the same")


def _closed(event: e.IncidentClosed, known: State | None) -> Forms:
    incident = name(event.incident)
    if event.proven is None:
        return Forms(f"{incident} is closed, with nothing to prove", "close", f"{incident}, with nothing to prove")
    if not event.proven:
        why = event.proof.get("mismatch")
        text = f"{incident} NOT PROVEN{because(why) if isinstance(why, str) else ''}"
        return Forms(text, "close", text)
    parts = "; ".join(filter(None, (_in_force(event.proof), _cost(event))))
    text = f"{incident} proven{f': {parts}' if parts else ''}"
    return Forms(text, "close", text)


def _in_force(proof: Mapping[str, Any]) -> str:
    """`0.000668603 in force at step 101`: the first update that was read back; empty if none was."""
    read = proof.get("readbacks")
    first = next(iter(cast("Sequence[Any]", read)), None) if isinstance(read, list | tuple) else None
    if not isinstance(first, Mapping):
        return ""
    known = cast("Mapping[str, Any]", first)
    lr, step = number_in(known, "lr"), number_in(known, "step")
    return f"{figure(lr, 6)} in force at step {step:,.0f}" if lr is not None and step is not None else ""


def _cost(event: e.IncidentClosed) -> str:
    if not event.steps_lost and not event.seconds_down:
        return "nothing lost" if event.steps_lost is not None else ""
    parts = [
        *([count(event.steps_lost, "step")] if event.steps_lost else []),
        *([duration(event.seconds_down)] if event.seconds_down else []),
    ]
    return f"{' and '.join(parts)} lost"


def _completed(event: e.LineageCompleted, known: State | None) -> Forms:
    why = because(event.why, "; ")
    steps = f"all {count(event.step, 'step')}"
    return Forms(f"{steps} are trained{why}", "complete", f"the lineage: {steps} are trained{why}")


def _halted(event: e.LineageHalted, known: State | None) -> Forms:
    why = because(event.why)
    return Forms(f"stopped, a person is needed{why}", "stop", f"and page a person{why}")


def _cancelled(event: e.LineageCancelled, known: State | None) -> Forms:
    asked = known.stop if known is not None else None
    if asked is not None and asked.request == event.request:
        return Forms(
            f"stopped for good, as {name(asked.author)} asked", "stop", f"for good, as {name(asked.author)} asks"
        )
    why = after(": ", event.why)
    return Forms(f"stopped for good{why}", "stop", f"for good{why}")


def _alert(event: e.AlertIntended, known: State | None) -> Forms:
    what = f"people ({event.severity}): {quoted(event.title)}"
    return acts("tell", what)


def _settled(event: e.AlertSettled, known: State | None) -> Forms:
    alert = known.alerts.get(event.alert) if known is not None else None
    what = f": {quoted(alert.told.title, 60)}" if alert is not None else ""
    if event.delivered:
        return seen(f"people were told{what}")
    why = because(event.why, longest=70)
    return seen(f"people could NOT be told{why}{what.replace(': ', ', of ', 1) if what else ''}")


RULES: Mapping[type[e.Event], Callable[[Any, State | None], Forms]] = {
    e.SignalRaised: _signal,
    e.NodeJudged: _judged,
    e.IncidentOpened: _opened,
    e.ProposalMade: _proposed,
    e.ProposalAnswered: _answered,
    e.RecoveryDecided: _decided,
    e.AfterthoughtAdded: _afterthought,
    e.NodeExcluded: _excluded,
    e.DrainIntended: _drain,
    e.NodeDrained: _drained,
    e.IncidentClosed: _closed,
    e.LineageCompleted: _completed,
    e.LineageHalted: _halted,
    e.LineageCancelled: _cancelled,
    e.AlertIntended: _alert,
    e.AlertSettled: _settled,
}
