"""What a finding is called in one line: the cause of the incident that it opens."""

from __future__ import annotations

import signal as signals
from collections.abc import Callable, Mapping

from opt_ops.core.events import SignalRaised


def cause(raised: SignalRaised) -> str:
    """Who or what, where and since when; from the finding's own numbers."""
    told = _CAUSES.get(raised.signal)
    return told(raised) if told else f"{raised.signal}: {raised.rule}"


def _where(raised: SignalRaised) -> str:
    return f"rank {raised.evidence['rank']} on {', '.join(raised.nodes)}"


def _rank_ended(raised: SignalRaised) -> str:
    evidence = raised.evidence
    if number := evidence.get("signal"):
        return f"{_where(raised)} was killed by signal {number} ({_signal_name(int(number))})"
    line = str(evidence.get("line") or "")
    return f"{_where(raised)} left with code {evidence['code']}" + (f": {line[:160]}" if line else "")


def _job_ended(raised: SignalRaised) -> str:
    return f"job {raised.evidence['job']} ended under the attempt: {raised.evidence['reason']}"


def _loss_spike(raised: SignalRaised) -> str:
    return (
        f"loss {raised.evidence['loss']:.3f} at step {raised.step}, median {raised.evidence['median']:.3f}; "
        f"out of its band since step {raised.onset_step}"
    )


def _loss_too_low(raised: SignalRaised) -> str:
    return (
        f"loss {raised.evidence['level']:.3f} at step {raised.step}, {raised.evidence['before']:.3f} before it fell at "
        f"step {raised.onset_step}: wrong or repeated data?"
    )


def _hang(raised: SignalRaised) -> str:
    evidence = raised.evidence
    patience = f"patience is {evidence['patience']:.0f} s"
    return f"no step for {evidence['seconds']:.0f} s in {evidence['phase']}, {patience}"


def _throughput_drop(raised: SignalRaised) -> str:
    evidence = raised.evidence
    slower = 1 - evidence["wps"] / evidence["best"]
    behind = f": {', '.join(raised.nodes)}, {evidence['why']}" if raised.nodes else ""
    return f"tokens per second {slower:.0%} below the attempt's best since step {raised.onset_step}{behind}"


def _silent_data_corruption(raised: SignalRaised) -> str:
    evidence = raised.evidence
    if "ranks" not in evidence:  # all that is known is the exit code
        return _rank_ended(raised)
    where = f" on {', '.join(raised.nodes)}" if raised.nodes else ""
    doubt = "" if evidence["certain"] else ", and it cannot be told which of them"
    return f"data is corrupt on rank {', '.join(map(str, evidence['ranks']))}{where}{doubt}: {evidence['what']}"


def _loss_scale_floor(raised: SignalRaised) -> str:
    evidence = raised.evidence
    if "loss_scale" not in evidence:
        return _rank_ended(raised)
    return f"loss scale {evidence['loss_scale']:g} at step {raised.step}: at or below {evidence['floor']:g}"


def _non_finite(raised: SignalRaised) -> str:
    module = raised.evidence.get("bad_module")
    where = f"; first in the {module}" if module else ""
    return f"loss or gradient norm not finite at step {raised.step}{where}"


def _silent_node(raised: SignalRaised) -> str:
    return f"{', '.join(raised.nodes)} silent for {raised.evidence['seconds']:.0f} s"


def _straggler(raised: SignalRaised) -> str:
    return f"{_where(raised)} takes {raised.evidence['ratio']:.1f} times as long as the others"


_CAUSES: Mapping[str, Callable[[SignalRaised], str]] = {
    **dict.fromkeys(
        (
            *("process_death", "user_error", "checkpoint_refused", "gpu_error"),
            *("out_of_memory", "communication", "storage"),
        ),
        _rank_ended,
    ),
    **dict.fromkeys(("allocation_lost", "time_limit", "preemption", "job_cancelled"), _job_ended),
    "loss_spike": _loss_spike,
    "loss_too_low": _loss_too_low,
    "non_finite_loss": _non_finite,
    "loss_scale_floor": _loss_scale_floor,
    "hang": _hang,
    "silent_node": _silent_node,
    "straggler": _straggler,
    "throughput_drop": _throughput_drop,
    "silent_data_corruption": _silent_data_corruption,
}


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "not a signal of this platform"
