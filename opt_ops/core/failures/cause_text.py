"""The sentence that names an incident's cause: who or what, where, since when, from the finding's own numbers."""

from __future__ import annotations

import signal as signals
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Raised(Protocol):
    """What the sentences need of a finding (`SignalRaised`)."""

    @property
    def signal(self) -> str: ...  # noqa: D102
    @property
    def step(self) -> int | None: ...  # noqa: D102
    @property
    def onset_step(self) -> int | None: ...  # noqa: D102
    @property
    def nodes(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def rule(self) -> str: ...  # noqa: D102
    @property
    def evidence(self) -> Mapping[str, Any]: ...  # noqa: D102


def by_rule(raised: Raised) -> str:
    """For a class without a sentence of its own: the rule that applied."""
    return f"{raised.signal}: {raised.rule}"


def loss_drift(raised: Raised) -> str:
    """A loss that rose slowly."""
    evidence = raised.evidence
    if "limit" in evidence:
        return _above_best(raised)
    rise = evidence["level"] - evidence["best"]  # as older versions journaled it
    return (
        f"loss {evidence['level']:.3f} at step {raised.step}, {rise:.3f} above its best level {evidence['best']:.3f}; "
        f"rising since step {raised.onset_step}"
    )


def _where(raised: Raised) -> str:
    place = ", ".join(raised.nodes) or raised.evidence.get("place") or "an unknown node"
    return f"rank {raised.evidence['rank']} on {place}"


def rank_ended(raised: Raised) -> str:
    """A rank that ended: its signal or its exit code, the line of its log that says why, and how many ended so."""
    evidence = raised.evidence
    if "rank" not in evidence:  # a job of which only the log is known
        return _log_ended(raised)
    number, line, alike = evidence.get("signal"), str(evidence.get("line") or ""), evidence.get("alike_ranks") or 1
    how = (
        f"was killed by signal {number} ({_signal_name(int(number))})"
        if number
        else f"left with code {evidence['code']}"
    )
    others = f" ({alike} ranks on {evidence['alike_nodes']} nodes ended so)" if not raised.nodes and alike > 1 else ""
    return f"{_where(raised)} {how}{others}" + (f": {line[:160]}" if line else "")


def _log_ended(raised: Raised) -> str:
    evidence = raised.evidence
    line = str(evidence.get("line") or "")
    return f"{evidence.get('job', raised.rule)}" + (f": {line[:160]}" if line else "")


def job_ended(raised: Raised) -> str:
    """A job that ended under its attempt."""
    if "reason" not in raised.evidence:
        return _log_ended(raised)
    return f"job {raised.evidence['job']} ended under the attempt: {raised.evidence['reason']}"


def suspended(raised: Raised) -> str:
    """A job that the scheduler has stopped, with its nodes still ours."""
    minutes = raised.evidence["seconds"] / 60
    return f"job {raised.evidence['job']} is suspended for {minutes:.0f} min; its nodes are held, and nothing trains"


def loss_spike(raised: Raised) -> str:
    """A loss out of its band."""
    if "median" not in raised.evidence:
        return _above_best(raised)
    return (  # as older versions journaled it
        f"loss {raised.evidence['loss']:.3f} at step {raised.step}, median {raised.evidence['median']:.3f}; "
        f"out of its band since step {raised.onset_step}"
    )


def _above_best(raised: Raised) -> str:
    evidence = raised.evidence
    return (
        f"loss {evidence['loss']:.3f} at step {raised.step}, best level {evidence['limit']:.3f}; "
        f"above it since step {raised.onset_step}"
    )


def unplanned_lr(raised: Raised) -> str:
    """A learning rate that is not the planned one."""
    evidence = raised.evidence
    if "planned_lr" not in evidence:
        return raised.rule
    return f"learning rate {evidence['lr']:.6g} at step {raised.step}, {evidence['planned_lr']:.6g} was planned"


def loss_too_low(raised: Raised) -> str:
    """A loss that fell further than a schedule explains."""
    return (
        f"loss {raised.evidence['level']:.3f} at step {raised.step}, {raised.evidence['before']:.3f} before it fell at "
        f"step {raised.onset_step}: wrong or repeated data?"
    )


def hang(raised: Raised) -> str:
    """No progress for longer than the phase usually takes."""
    evidence = raised.evidence
    if "log" in evidence:  # only the job's log is known
        line = str(evidence.get("line") or "")
        said = f"; last error in the log: {line[:160]}" if line else ""
        return (
            f"no line for {evidence['seconds']:.0f} s (timeout {evidence['patience']:.0f} s), {evidence['log']}{said}"
        )
    return f"no step for {evidence['seconds']:.0f} s in {evidence['phase']} (timeout {evidence['patience']:.0f} s)"


def throughput_drop(raised: Raised) -> str:
    """Fewer tokens per second, with the node behind it where one stands out."""
    evidence = raised.evidence
    slower = 1 - evidence["wps"] / evidence["best"]
    behind = f": {', '.join(raised.nodes)}, {evidence['why']}" if raised.nodes else ""
    return f"tokens per second {slower:.0%} below the attempt's best since step {raised.onset_step}{behind}"


def silent_data_corruption(raised: Raised) -> str:
    """Ranks whose values differ. From an exit code alone: the rank that ended."""
    evidence = raised.evidence
    if "ranks" not in evidence:  # all that is known is the exit code
        return rank_ended(raised)
    where = f" on {', '.join(raised.nodes)}" if raised.nodes else ""
    doubt = "" if evidence["certain"] else " (which of them is not known)"
    return f"data is corrupt on rank {', '.join(map(str, evidence['ranks']))}{where}{doubt}: {evidence['what']}"


def loss_scale_floor(raised: Raised) -> str:
    """fp16's loss scale at its floor. From an exit code alone: the rank that ended."""
    evidence = raised.evidence
    if "loss_scale" not in evidence:
        return rank_ended(raised)
    return f"loss scale {evidence['loss_scale']:g} at step {raised.step}: at or below {evidence['floor']:g}"


def non_finite_loss(raised: Raised) -> str:
    """A loss or gradient norm that is not finite. From an exit code alone: the rank that ended."""
    if "loss" not in raised.evidence:
        return rank_ended(raised)
    module = raised.evidence.get("bad_module")
    where = f"; first in the {module}" if module else ""
    return f"loss or gradient norm not finite at step {raised.step}{where}"


def silent_node(raised: Raised) -> str:
    """A node without heartbeat."""
    return f"{', '.join(raised.nodes)} silent for {raised.evidence['seconds']:.0f} s"


def straggler(raised: Raised) -> str:
    """A rank that is slower than the others."""
    return f"{_where(raised)} takes {raised.evidence['ratio']:.1f} times as long as the others"


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return "not a signal of this platform"
