"""Which drill caused a finding: what each fault can cause, and in which window."""

from __future__ import annotations

from collections.abc import Mapping

from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.classes import ROWS, AlertSignal, Domain, FailureClass
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import Drill, State
from opt_ops.core.values import Fault

_LOSS = frozenset(kind for kind, row in ROWS.items() if row.domain is Domain.LOSS) | {
    AlertSignal.GRADIENT_NORM,
    AlertSignal.LOSS_PLATEAU,
    AlertSignal.LOSS_SCALE_FALLING,
    AlertSignal.ACTIVATION_NORM,
    AlertSignal.UPDATE_NORM,
    AlertSignal.OFF_FORECAST,
    FailureClass.UNDECLARED_CHANGE,
}

_DEATH = frozenset({FailureClass.PROCESS_DEATH, FailureClass.COMMUNICATION, FailureClass.HANG})

_CHANGES_WEIGHTS = frozenset({Fault.LR, Fault.NAN, Fault.FLIP_BIT})
"""They do something at some steps, and what they did to weights and moments is in every later checkpoint."""

_ENDS_RANKS = frozenset({Fault.KILL_RANK, Fault.KILL_NODE, Fault.KILL_PAIR, Fault.HANG})

CAN_CAUSE: Mapping[Fault, frozenset[str]] = {
    Fault.LR: _LOSS | {FailureClass.UNPLANNED_LR},
    Fault.NAN: _LOSS | {FailureClass.COMMUNICATION, FailureClass.PROCESS_DEATH},
    Fault.FLIP_BIT: _LOSS | {FailureClass.SILENT_DATA_CORRUPTION, FailureClass.COMMUNICATION},
    Fault.KILL_RANK: _DEATH,
    Fault.KILL_NODE: _DEATH,
    Fault.KILL_PAIR: _DEATH,
    Fault.SLOW_STANDBY: frozenset(),
    Fault.HANG: frozenset({FailureClass.HANG, FailureClass.COMMUNICATION, FailureClass.PROCESS_DEATH}),
    Fault.XID: frozenset({FailureClass.BAD_GPU}),
    Fault.KILL_DAEMON: frozenset({FailureClass.DAEMON_RESTART}),
}
"""What each fault can cause. An Xid is marked by the node that logs it, a killed daemon by its successor."""

_AFTERMATH_STEPS = 256
"""Steps after the last update of a drill in which trouble may begin: a fast trainer reads the drill dozens of steps
late, and the optimizer's moments keep what it did to them."""

_BLURRED_STEPS = 64
"""By which the onset of a slow finding may be placed too early: half of the detector's window, and what it rounds."""

_BLURRED = frozenset({FailureClass.LOSS_DRIFT, FailureClass.LOSS_TOO_LOW, AlertSignal.LOSS_PLATEAU})


def drill_behind(state: State, raised: SignalRaised) -> str | None:
    """The name of the drill that caused a finding; None: no drill did."""
    attempt = state.attempts.get(raised.attempt)
    return next(
        (
            each.name
            for each in state.drills.values()
            if (raised.attempt == each.attempt or _resumed_after(state, each, raised.attempt))
            and _caused(each, raised)
            and not _is_over(each, raised, attempt)
        ),
        None,
    )


def _resumed_after(state: State, drill: Drill, name: str) -> bool:
    """Whether an attempt goes on from what the drill did to the weights: it and all since resumed behind its step.

    A rollback, which begins a run of its own, has left that behind.
    """
    first = drill.arguments.get("from_step")
    if drill.fault not in _CHANGES_WEIGHTS or first is None or drill.attempt is None:
        return False
    if drill.attempt not in state.attempts:
        return False
    names = list(state.attempts)
    since = names[names.index(drill.attempt) + 1 : names.index(name) + 1] if name in state.attempts else []
    run = state.attempts[drill.attempt].run
    resumed = [(state.attempts[each].run, state.attempts[each].checkpoint) for each in since]
    return bool(resumed) and all(its == run and at is not None and at.step >= int(first) for its, at in resumed)


def _is_over(drill: Drill, raised: SignalRaised, attempt: Attempt | None) -> bool:
    """Whether the ranks that the drill hit had been replaced before: what comes later is no drill."""
    if drill.fault not in _ENDS_RANKS or attempt is None:
        return False
    after = (each for each in attempt.members if each.intended_at > drill.at)
    return any(each.joined_at is not None and each.joined_at < raised.at for each in after)


def _caused(drill: Drill, raised: SignalRaised) -> bool:
    if raised.signal not in CAN_CAUSE[drill.fault]:
        return False
    if drill.attempt != raised.attempt:
        return raised.signal in _LOSS and _begins_in_window(drill, raised)
    match drill.fault:
        case Fault.LR:
            return _begins_in_window(drill, raised)
        case Fault.NAN if raised.signal == FailureClass.NON_FINITE_LOSS and raised.step is not None:
            return raised.step >= int(drill.arguments["from_step"])
        case Fault.FLIP_BIT if raised.signal == FailureClass.SILENT_DATA_CORRUPTION:
            return drill.arguments["rank"] in raised.evidence.get("ranks", (raised.evidence.get("rank"),))
        case Fault.NAN | Fault.FLIP_BIT if raised.signal in _LOSS:
            return _begins_in_window(drill, raised)
        case Fault.KILL_RANK | Fault.KILL_NODE | Fault.KILL_PAIR if raised.signal == FailureClass.PROCESS_DEATH:
            return raised.evidence.get("rank") in killed(drill) and raised.evidence.get("signal") == 9
        case Fault.HANG if raised.signal == FailureClass.HANG:
            return True
        case _:  # what peers do when a rank is gone: it ends the attempt, so nothing that comes later can be meant
            return raised.at + float(raised.evidence.get("seconds") or 0.0) >= drill.at


def killed(drill: Drill) -> tuple[int, ...]:
    """The ranks that a drill kills."""
    arguments = drill.arguments
    return tuple(arguments["ranks"]) if "ranks" in arguments else (arguments["rank"],)


def _begins_in_window(drill: Drill, raised: SignalRaised) -> bool:
    """Whether its onset lies between the first update of the drill and a while after the last one."""
    first = int(drill.arguments["from_step"])
    last = first + int(drill.arguments.get("updates", 1)) + _AFTERMATH_STEPS
    onset = raised.onset_step if raised.onset_step is not None else raised.step
    if onset is None:
        return False
    earliest = first - (_BLURRED_STEPS if raised.signal in _BLURRED else 0)
    return earliest <= onset <= last and (raised.step is None or raised.step >= first)
