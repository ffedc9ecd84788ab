"""Which drill caused a finding."""

from __future__ import annotations

from opt_ops.core.events import SignalRaised
from opt_ops.core.failures.classes import Domain, FailureClass, row
from opt_ops.core.state.model import Drill, State
from opt_ops.core.values import Fault


def drill_behind(state: State, raised: SignalRaised) -> str | None:
    """The name of the drill that caused a finding; None: no drill did."""
    return next((drill.name for drill in state.drills.values() if _caused(drill, raised)), None)


def _caused(drill: Drill, raised: SignalRaised) -> bool:
    if drill.attempt != raised.attempt:
        return False
    if drill.fault is Fault.LR and row(raised.signal).domain is Domain.LOSS:
        return (raised.onset_step or 0) > int(drill.arguments["from_step"])
    if drill.fault is Fault.KILL_RANK and raised.signal == FailureClass.PROCESS_DEATH:
        return raised.evidence.get("rank") == drill.arguments["rank"] and raised.evidence.get("signal") == 9
    if drill.fault is Fault.FLIP_BIT and raised.signal == FailureClass.SILENT_DATA_CORRUPTION:
        return drill.arguments["rank"] in raised.evidence.get("ranks", (raised.evidence.get("rank"),))
    if drill.fault is Fault.HANG:
        return raised.signal == FailureClass.HANG
    return False
