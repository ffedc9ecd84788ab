"""How far the status of a lineage can be trusted: how old it is, who watches, and what is open.

The journal tells the last status that a daemon saw. A status that is not an end is doubted where no daemon watches,
where no step or heartbeat comes, or where the scheduler does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from opt_ops.contract.phases import PhaseName
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.told import words
from opt_ops.core.values import Severity, Tier
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import Tail
from opt_ops.runfolder.liveness import Watch, span

OLD_STEP_SECONDS = 30.0  # at least: an attempt that makes a step a minute is not doubted after half of one
OLD_HEARTBEAT_SECONDS = 30.0  # an agent writes one every two seconds; docs/health.md calls a node silent after 25 s
_NO_ANSWER_SECONDS = 20.0  # one slow answer of a scheduler is nothing
_UNDELIVERED_SECONDS = 120.0  # an alert is tried again after a minute
_OPEN_STEPS = 100  # twice `heal_steps`: a finding of the alert tier that came to nothing is over by then
_OPEN_SECONDS = 600.0  # at least

_SLOW_PHASES = (PhaseName.EVALUATION, PhaseName.SAVING, PhaseName.ENDING)
_PHASE_SECONDS = 600.0  # no save or evaluation is believed for longer; the daemon calls it a hang before

_TELEMETRY_BYTES = 64 * 1024  # the last lines: enough for the usual time between two steps
_HEARTBEAT_BYTES = 256 * 1024  # a heartbeat with hundreds of mounts is 100 KiB long
_FIRST_HEARTBEAT_SECONDS = 120.0  # for agents to start on nodes that were just given

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong with a lineage now, with the next command. `doubt`: the status cannot be trusted."""

    finding: str
    why: str
    next: str
    doubt: bool = False

    def row(self) -> dict[str, str]:
        """For `run show --check`."""
        return {"finding": self.finding, "why": self.why, "next": self.next}


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest telemetry of an attempt."""

    line: Mapping[str, Any] | None = None
    step: int | None = None
    at: float | None = None
    usual_seconds: float = 0.0
    """The longest time between two of the last steps."""
    why: str = ""
    """Why there is none although there is a file."""


def newest(path: Path, attempt: Attempt | None) -> Newest:
    """The end of the attempt's telemetry; where there is none, what the journal says."""
    if attempt is None:
        return Newest()
    tail = Tail(path / attempt_folder(attempt.name) / "telemetry.jsonl")
    why = ""
    lines: list[dict[str, Any]] = []
    try:
        tail.skip_to_last(_TELEMETRY_BYTES)
        lines = list(tail.read())
    except (OSError, ValueError) as error:
        why = f"its telemetry cannot be read: {error}"
    known = [
        (line, at, step) for line in lines if (at := _moment(line)) is not None and (step := _step(line)) is not None
    ]
    if not known:
        why = why or ("its newest telemetry is not what docs/formats.md says" if lines else "")
        return Newest(step=attempt.last_step, at=attempt.last_step_at, why=why)
    gaps = [later - earlier for (_, earlier, _), (_, later, _) in pairwise(known)]
    line, at, step = known[-1]
    return Newest(line=line, step=step, at=at, usual_seconds=max([*gaps, finite(line.get("step_seconds")) or 0.0]))


def finite(value: Any) -> float | None:
    """A number that another trainer wrote; None if it is none, or not finite."""
    return _as(f.number(), value)


def _moment(line: Mapping[str, Any], key: str = "ts") -> float | None:
    return _as(f.moment, line.get(key))


def _step(line: Mapping[str, Any]) -> int | None:
    return _as(f.step, line.get("num_updates"))


def _as(convert: Callable[[Any], _T], value: Any) -> _T | None:
    try:
        return convert(value)
    except f.BadField:
        return None


def findings(path: Path, state: State, watch: Watch, found: Newest) -> list[Finding]:
    """What is wrong with a lineage now, what makes its status doubtful first. Of an ended one only a halt is wrong."""
    name = path.name
    if state.status is Status.HALTED:
        halted = Finding(finding="halted", why=state.why, next=f"opt-ops run explain {name}")
        return [halted, *_undelivered(state, name, watch.now)]
    if state.ended:
        return []
    faults = _watch_faults(state, name)
    return [*_doubts(path, state, watch, found), *faults, *_open(state, name, watch, found)]


def _doubts(path: Path, state: State, watch: Watch, found: Newest) -> Iterator[Finding]:
    name = path.name
    watcher = watch.over(name)
    if not watcher.watched:
        yield Finding(finding=watcher.finding, why=watcher.why, next=watcher.next, doubt=True)
    stopped = next((each for each in state.live_allocations if each.suspended), None)
    if stopped is not None:
        why = f"the scheduler has suspended job {stopped.job} for {span(watch.now - stopped.since)}"
        yield Finding(finding="suspended", why=why, next="opt-ops playbook show suspended", doubt=True)
    if stopped is None and (stale := _no_step(state, watch.now, found)) is not None:
        slow = _slow_phase(path, state, watch.now, found)
        why = f"{stale}, because of {slow}" if slow else stale
        yield Finding(finding="stale", why=why, next=f"opt-ops run logs {name}", doubt=not slow)
    if stopped is None and (silent := silent_nodes(path, state, watch.now)):
        longest = max(silent.values())
        named = ", ".join(list(silent)[:4]) + (f" and {len(silent) - 4} more" if len(silent) > 4 else "")
        why = f"no heartbeat of {named} for {span(longest)}"
        yield Finding(finding="silent", why=why, next=f"opt-ops node list {name}", doubt=True)
    for each in state.live_allocations:
        since = each.unknown_since
        if each.job is None and each.release_at is None and not (state.attempt and state.attempt.live):
            since = each.intended_at  # no job is known yet, and nothing runs meanwhile
        if since is not None and watch.now - since >= _NO_ANSWER_SECONDS:
            why = f"the scheduler does not answer about {each.job or each.name} since {span(watch.now - since)}"
            why += f": {each.reason}" if each.reason else ""
            yield Finding(finding="scheduler", why=why, next="opt-ops doctor", doubt=True)


def _no_step(state: State, now: float, found: Newest) -> str | None:
    """Why no step is known that is young enough for an attempt that trains."""
    attempt = state.attempt
    if state.status is not Status.TRAINING or attempt is None or not attempt.live:
        return None
    if found.why:
        return found.why
    if found.at is None:
        return "no step of it is known"
    limit = max(OLD_STEP_SECONDS, 2 * found.usual_seconds)
    return f"no step for {span(now - found.at)}" if now - found.at > limit else None


def _slow_phase(path: Path, state: State, now: float, found: Newest) -> str:
    """The phase that explains why no step comes, such as a save; empty if none does, or if it lasts too long."""
    if state.attempt is None:
        return ""
    tail = Tail(path / attempt_folder(state.attempt.name) / "phases.jsonl")
    try:
        tail.skip_to_last(_TELEMETRY_BYTES)
        last = next(iter(reversed(list(tail.read()))), {})
    except (OSError, ValueError):
        return ""
    name, since = last.get("phase"), _moment(last)
    slow = isinstance(name, str) and name in _SLOW_PHASES
    if not slow or since is None or since < (found.at or 0.0) or now - since > _PHASE_SECONDS:
        return ""
    return f"{name} for {span(now - since)}"


def silent_nodes(path: Path, state: State, now: float) -> dict[str, float]:
    """The held nodes without a heartbeat in the last 30 seconds, each with the seconds since the last one."""
    if state.ended or not (path / "health").is_dir():
        return {}
    silent: dict[str, float] = {}
    for node, holder in state.held.items():
        file = path / "health" / f"{node}.jsonl"
        if abs(now - _changed_at(file)) <= OLD_HEARTBEAT_SECONDS:
            continue  # the file changed just now: it need not be read
        at = heartbeat_at(file)
        if at is None:
            at = holder.since + _FIRST_HEARTBEAT_SECONDS - OLD_HEARTBEAT_SECONDS
        if now - at > OLD_HEARTBEAT_SECONDS:
            silent[node] = now - at
    return silent


def _changed_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def heartbeat_at(file: Path) -> float | None:
    """The time of the newest heartbeat in a health file; None if there is none."""
    tail = Tail(file)
    try:
        tail.skip_to_last(_HEARTBEAT_BYTES)
        times = [at for line in tail.read() if (at := _moment(line)) is not None]
    except (OSError, ValueError):
        return None
    return max(times, default=None)


def _watch_faults(state: State, name: str) -> Iterator[Finding]:
    """Parts of the watch that fail, and files of which most is left out: what they would show is not known."""
    following = f"opt-ops run show {name}"
    for part, failing in state.failing.items():
        why = f"a part of the watch fails: {part}: {failing.why}"
        yield Finding(finding="watch fails", why=why, next=following, doubt=part.startswith("the watch over"))
    for each in state.left_out.values():
        if each.most:
            yield Finding(finding="left out", why=f"most of {each.file}: {each.text}", next=following)


def _open(state: State, name: str, watch: Watch, found: Newest) -> Iterator[Finding]:
    incidents = list(state.incidents.values())
    for each in incidents:
        if each.closed_at is None:
            why = f"{each.name}, {words.failure(each.kind)}: {words.without_codes(each.cause)}"
            yield Finding(finding="incident", why=why, next=f"opt-ops run explain {each.name}")
    if incidents and incidents[-1].proven is False:
        last, why = incidents[-1].name, "the telemetry does not show that the action took effect"
        yield Finding(finding="not proven", why=f"{last}: {why}", next=f"opt-ops run explain {last}")
    for signal in open_signals(state, watch.now, found):
        why = f"{words.failure(signal.signal)} at step {signal.step}: {signal.rule}"
        yield Finding(finding="alert", why=why, next=f"opt-ops events {name} --kind signal_raised")
    yield from _undelivered(state, name, watch.now)
    watcher = watch.over(name)
    for problem in watcher.sign.problems if watcher.sign else ():
        if problem.get("lineage") in (None, name):
            why = f"{problem['what']}: {problem.get('why', '')}"
            yield Finding(finding="daemon", why=why, next="opt-ops daemon status")


def open_signals(state: State, now: float, found: Newest) -> Sequence[Any]:
    """The findings of the newest attempt to which no incident has answered yet, and that may still come to something.

    A finding of the alert tier is reported and nothing is touched. It is over when the attempt has gone on for a while.
    """
    attempt = state.attempt
    if attempt is None or not attempt.live:
        return []
    answered = {incident.signal for incident in state.incidents.values()}
    step = found.step if found.step is not None else attempt.last_step or 0
    return [
        signal
        for key, signal in state.signals.items()
        if signal.attempt == attempt.name
        and signal.tier in (Tier.ALERT, Tier.ACT)
        and key not in answered
        and (now - signal.at < _OPEN_SECONDS or (signal.step is not None and step - signal.step <= _OPEN_STEPS))
    ]


def _undelivered(state: State, name: str, now: float) -> Iterator[Finding]:
    for alert in state.alerts.values():
        page = alert.told.severity is Severity.PAGE
        if alert.delivered is None and page and now - alert.at > _UNDELIVERED_SECONDS:
            why = f"a page is not delivered since {span(now - alert.at)}: {alert.told.title}"
            yield Finding(finding="alert not delivered", why=why, next="opt-ops alerts test")


def shown(state: State, found: Sequence[Finding]) -> str:
    """The status as people see it: with a question mark where it cannot be trusted."""
    return f"{state.status}?" if any(each.doubt for each in found) else str(state.status)
