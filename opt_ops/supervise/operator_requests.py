"""Requests of operators: a valid request becomes an event, any other is refused with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from opt_ops.core.decide.asking import ASKED
from opt_ops.core.decide.next_run import factor_to
from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.events import (
    ChangeRequested,
    ChangesDeclared,
    DrillRequested,
    DriverChanged,
    Event,
    LineageStarted,
    NodeAllowed,
    NodeExcluded,
    NoteAdded,
    PauseRequested,
    RequestRefused,
    ResumeRequested,
    StopRequested,
    kind_of,
)
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.schedule import PlannedLr, is_computed
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import parse_planned
from opt_ops.core.state.queries import newest_good
from opt_ops.core.state.status import Status
from opt_ops.core.text import clean
from opt_ops.core.values import (
    Action,
    AskDefault,
    AskTerms,
    Driver,
    Fault,
    PlannedChange,
)
from opt_ops.ports import Inbox, Request
from opt_ops.supervise.drill_arguments import drill_arguments
from opt_ops.supervise.evaluation_arguments import evaluated, sampled
from opt_ops.supervise.proposal_answers import approved, declined
from opt_ops.supervise.request_arguments import (
    LONGEST_REASON,
    LONGEST_TEXT,
    MOST_AT_ONCE,
    MOST_STEPS,
    Arguments,
    InvalidRequest,
)
from opt_ops.supervise.start_arguments import origin, other_data, planned_data, shape_of

_LONGEST_NAME, _LONGEST_WHY = 255, 1000  # characters
_NODE = re.compile(r"[A-Za-z0-9_.-]+")  # one name; the scheduler would read a list or a range as several nodes
_RESULTS = ("evaluated", "sampled")  # of evaluations
_LONGEST_WAIT = 7 * 86_400.0  # seconds for which a proposal may wait

_DRIVERS = {Driver.DAEMON: "the daemon", Driver.OPERATOR: "an operator", Driver.SHADOW: "another launcher"}


class RequestWatch:
    """Reads the inbox."""

    def __init__(self, inbox: Inbox, now: Callable[[], float]) -> None:
        """`now` is the wall clock. It is never before the last sign of an earlier daemon process."""
        self._inbox = inbox
        self._now = now

    def observe(self, state: Callable[[], State]) -> Iterator[Event]:
        """Yield an event for each request, judged on the present state: the oldest first, results of evaluations last.

        An evaluation leaves hundreds of requests. Nothing may wait for them, so the folder is read once, and a part is
        taken at a time. A request that was journaled before a crash is only removed from the inbox.
        """
        taken = 0
        for request in sorted(self._inbox.requests(), key=lambda request: request.verb in _RESULTS):
            if request.request not in state().requests:
                if taken == MOST_AT_ONCE:
                    return
                taken += 1
                yield event_of(state(), self._made(request))  # it is journaled before it leaves the inbox
            self._inbox.done(request.request)

    def _made(self, request: Request) -> Request:
        """The request as made by now: the clock of the command's host may be ahead."""
        return replace(request, asked_at=min(self._now(), request.asked_at or math.inf))


def event_of(state: State, request: Request) -> Event:
    """Return the event to journal for this request on this state. It can be a `RequestRefused`."""
    if request.unusable:
        return _refusal(request.request, request.author, request.verb, request.unusable)
    try:
        return _VERBS[request.verb](state, request)
    except KeyError as error:
        why = f"unknown verb or missing argument {error}"
    except Exception as error:  # noqa: BLE001 - whatever a request holds, its author hears why it is refused
        why = str(error) or type(error).__name__
    return _refusal(request.request, request.author, request.verb, why)


def refused(event: Event, why: str) -> RequestRefused:
    """The answer to a request whose event the journal does not take."""
    return _refusal(getattr(event, "request", "") or "", getattr(event, "author", "") or "", kind_of(event), why)


def _refusal(request: str, author: str, verb: str, why: str) -> RequestRefused:
    return RequestRefused(
        request=clean(request, _LONGEST_NAME),
        author=clean(author, _LONGEST_NAME),
        verb=clean(verb, _LONGEST_NAME),
        why=clean(why, _LONGEST_WHY),
    )


def _start(state: State, request: Request) -> Event:
    if state.lineage is not None:
        raise InvalidRequest("the lineage is already started")
    given = Arguments(request.arguments)
    return LineageStarted(
        request=request.request,
        author=request.author,
        lineage=given.lineage("lineage"),
        recipe=given.text("recipe"),
        settings=given.texts("settings"),
        data=given.texts("data"),
        tokenizer=given.optional_text("tokenizer"),
        valid=given.texts("valid", ()),
        shape=shape_of(given.part("shape")),
        driver=Driver(given.text("driver", default=Driver.DAEMON)),
        planned=_planned(request),
        init_from=given.text("init_from", LONGEST_REASON, "") or None,
        reason=given.text("reason", LONGEST_REASON, ""),
        data_since=planned_data(given),
        **origin(given),
    )


def _plan(state: State, request: Request) -> Event:
    """Declare changes that somebody else makes: nothing is restarted, so this is taken in every mode."""
    _alive(state)
    if not (planned := _planned(request)):
        raise InvalidRequest("no change is declared")
    return ChangesDeclared(request=request.request, author=request.author, reason=_reason(request), planned=planned)


def _planned(request: Request) -> tuple[PlannedChange, ...]:
    changes: list[PlannedChange] = []
    for text in Arguments(request.arguments).texts("planned", ()):
        try:
            change = parse_planned(text)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        if change.step > MOST_STEPS:
            raise InvalidRequest(f"planned step {change.step} is above {MOST_STEPS}")
        changes.append(replace(change, by=request.author))
    return tuple(changes)


def _stop(state: State, request: Request) -> Event:
    if state.lineage is None or state.ended:
        raise InvalidRequest(f"the lineage is {state.status}")
    return StopRequested(request=request.request, author=request.author, reason=_reason(request))


def _pause(state: State, request: Request) -> Event:
    _alive(state)
    if state.paused is not None:
        raise InvalidRequest(f"already paused by {state.paused.author}")
    return PauseRequested(
        request=request.request,
        author=request.author,
        reason=_reason(request),
        keep_nodes=Arguments(request.arguments).flag("keep_nodes"),
    )


def _resume(state: State, request: Request) -> Event:
    attempt = state.attempt
    if state.lineage is None or state.status in (Status.COMPLETED, Status.CANCELLED):
        raise InvalidRequest(f"the lineage is {state.status}")
    if attempt is not None and attempt.live and attempt.leave_at is None and state.paused is None:
        raise InvalidRequest(f"attempt {attempt.name} is running: there is nothing to resume")
    return ResumeRequested(
        request=request.request,
        author=request.author,
        reason=Arguments(request.arguments).text("reason", LONGEST_REASON, ""),
    )


def _change(state: State, request: Request) -> Event:
    """`rollback` and `set` both make the next run."""
    if state.run is None or state.status in (Status.COMPLETED, Status.CANCELLED):
        raise InvalidRequest(f"the lineage is {state.status}")
    if state.driver is Driver.SHADOW:
        raise InvalidRequest("the lineage is in shadow mode: another launcher runs this training")
    given = Arguments(request.arguments)
    to_step, lr = given.optional_whole("to_step", 0, MOST_STEPS), given.optional_positive("lr")
    if to_step is not None and newest_good(state, state.run.name, to_step) is None:
        raise InvalidRequest(f"there is no verified healthy checkpoint at or before step {to_step}")
    settings = given.texts("settings", ())
    resumed = to_step if to_step is not None else (state.attempt and state.attempt.last_step) or 0
    if lr is not None:
        _check_lr(state, lr, settings, resumed)
    _check_end(settings, resumed)
    return ChangeRequested(
        request=request.request,
        author=request.author,
        reason=_reason(request),
        to_step=to_step,
        lr_factor=given.optional_positive("lr_factor"),
        lr=lr,
        settings=settings,
        skip_batches=given.whole("skip_batches", 0, MOST_STEPS, 0),
        keep_later=given.flag("keep_later"),
        planned=_planned(request),
        data=other_data(state, given),
    )


def _check_lr(state: State, lr: float, settings: tuple[str, ...], step: int) -> None:
    """Refuse a learning rate that no factor on the schedule gives."""
    known = baseline(state)
    if known is None or state.run is None:
        raise InvalidRequest("the learning rate cannot be set yet: no attempt has reported its schedule")
    schedule, _ = with_settings(*known, (*state.run.settings, *settings))
    if not is_computed(schedule):
        raise InvalidRequest(
            f"the trainer's schedule is {schedule.kind!r}; opt-ops can only scale it: run rollback --lr-scale"
        )
    if factor_to(lr, PlannedLr(schedule=schedule, factors=state.run.lr_factors), step) is None:
        raise InvalidRequest(
            f"the schedule's learning rate after step {step} is 0, and a factor cannot raise it: change the schedule, "
            "for example with optim.total_steps=…, or go back to an earlier step"
        )


def _reason(request: Request) -> str:
    return Arguments(request.arguments).text("reason", LONGEST_REASON)


def _check_end(settings: tuple[str, ...], step: int) -> None:
    """Refuse an end before the step at which training resumes: the trainer would refuse it and halt the lineage."""
    for setting in settings:
        name, _, value = setting.partition("=")
        if name == "steps" and value.isdecimal() and int(value) <= step:
            raise InvalidRequest(
                f"steps={value}: training would resume at about step {step}; use `opt-ops run stop` to end it"
            )


def _drive(state: State, request: Request) -> Event:
    _alive(state)
    given = Arguments(request.arguments)
    driver = Driver(given.text("driver"))
    if Driver.SHADOW in (driver, state.driver):
        raise InvalidRequest("shadow mode can be chosen only when a lineage is started")
    if driver is state.driver and driver is not Driver.ASK:
        raise InvalidRequest(f"{_DRIVERS[driver]} already drives")
    return DriverChanged(
        request=request.request,
        author=request.author,
        driver=driver,
        reason=given.text("reason", LONGEST_REASON, ""),
        ask=_terms(given) if driver is Driver.ASK else None,
    )


def _terms(given: Arguments) -> AskTerms:
    default, seconds = given.text("default", default=""), given.optional_positive("seconds")
    only = given.texts("only", ())
    if seconds is not None and seconds > _LONGEST_WAIT:
        raise InvalidRequest(f"a proposal waits for at most {_LONGEST_WAIT / 86_400:g} days")
    if wrong := [each for each in only if each not in ASKED]:
        raise InvalidRequest(f"{wrong[0]!r} is not asked about; {', '.join(ASKED)} are")
    return AskTerms(
        default=AskDefault(default) if default else None, seconds=seconds, only=tuple(Action(each) for each in only)
    )


def _exclude(state: State, request: Request) -> Event:
    node = Arguments(request.arguments).text("node")
    known = state.nodes.get(node)
    _alive(state)
    if not _NODE.fullmatch(node):
        raise InvalidRequest(f"{node!r} is not the name of one node")
    if known is not None and known.excluded_by:
        raise InvalidRequest(f"{node} is already excluded by {known.excluded_by}")
    return NodeExcluded(
        node=node,
        incident=FailureClass.OPERATOR,
        reason=_reason(request),
        request=request.request,
        author=request.author,
    )


def _allow(state: State, request: Request) -> Event:
    given = Arguments(request.arguments)
    node = given.text("node")
    if node not in state.nodes or not (state.nodes[node].excluded_by or node in state.bad_parts.values()):
        excluded = ", ".join(name for name, each in state.nodes.items() if each.excluded_by) or "none"
        raise InvalidRequest(f"{node} is not excluded; excluded nodes: {excluded}")
    return NodeAllowed(
        request=request.request,
        author=request.author,
        node=node,
        reason=_reason(request),
        retested=given.flag("retested"),
    )


def _alive(state: State) -> None:
    if state.lineage is None or state.ended:
        raise InvalidRequest(f"the lineage is {state.status}")


def _note(state: State, request: Request) -> Event:
    given = Arguments(request.arguments)
    return NoteAdded(
        request=request.request,
        author=request.author,
        target=given.text("target"),
        text=given.text("text", LONGEST_TEXT),
        correction=given.flag("correction"),
    )


def _drill(state: State, request: Request) -> Event:
    fault = Fault(Arguments(request.arguments).text("fault"))
    attempt = state.attempt if state.attempt and state.attempt.live else None
    if state.ended or (attempt is None and fault is not Fault.KILL_DAEMON):
        raise InvalidRequest(f"no attempt is running; the lineage is {state.status}")
    return DrillRequested(
        request=request.request,
        author=request.author,
        drill=f"d{len(state.drills):03d}",
        fault=fault,
        attempt=attempt.name if attempt else None,
        arguments=drill_arguments(state, attempt, fault, Arguments(request.arguments)),
    )


_VERBS = {
    "start": _start,
    "stop": _stop,
    "pause": _pause,
    "resume": _resume,
    "change": _change,
    "plan": _plan,
    "drive": _drive,
    "approve": approved,
    "decline": declined,
    "exclude": _exclude,
    "allow": _allow,
    "note": _note,
    "drill": _drill,
    "evaluated": evaluated,
    "sampled": sampled,
}
