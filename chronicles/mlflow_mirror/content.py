"""What MLflow should hold of a lineage: runs, tags, parameters, points. Pure; `mlflow_sync` makes it so.

A lineage is a parent run with the settled curve; each of its runs is a child with what really happened. Everything here
is a function of journal, telemetry and the trainer's config.json, timestamps included: sending it again adds nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.logbook.drawing.markdown import note
from chronicles.logbook.front_page import front
from chronicles.record import LineageRecord
from chronicles.wording import percent
from opt_ops import __version__
from opt_ops.core.state.model import Run, State
from opt_ops.core.state.queries import lr_scale, newest_good
from opt_ops.core.state.status import Status
from opt_ops.core.text import from_iso

EVERY = 10  # steps between the points that are sent
WHOLE = 2_000  # steps: a lineage no longer than this is sent whole
AROUND = 30  # steps before and after an incident of which every one is sent
SETTLED_POINTS = 2_000  # of the parent's curve, about: MLflow draws no more than 2,500
TAG_LIMIT = 7_900  # characters, the note among them; MLflow cuts tags at 8,000 without a word
PARAM_LIMIT = 5_900  # characters; MLflow cuts parameters at 6,000

CORE = ("loss", "gnorm", "lr", "wps", "step_seconds")
SERIES = (*CORE, "actv_norm", "loss_scale", "tflops", "mfu", "cuda_gb_allocated")

Window = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A run as MLflow should show it. Times are milliseconds since the epoch."""

    name: str
    parent: str | None
    status: str  # RUNNING, FINISHED, FAILED, KILLED: all that MLflow knows
    start: int
    end: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of an attempt's updates are sent: every `every`-th, and all in the windows."""

    every: int
    windows: tuple[Window, ...]

    def takes(self, step: int) -> bool:
        """Whether the update is sent."""
        return step % self.every == 0 or any(first <= step <= last for first, last in self.windows)


def lineage_key(state: State) -> str:
    """Tells this lineage from others of the same number: the request that started it has a name of its own."""
    assert state.lineage is not None
    return re.sub(r"[^\w./-]", "_", f"{state.lineage.lineage}/{state.lineage.request}")


def targets(record: LineageRecord, report: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """The parent, then a child for each run. `configs` are the attempts' config.json, where there is one."""
    state = record.state
    return [_parent(record, report, configs), *(_child(record, run, configs) for run in state.runs.values())]


def _parent(record: LineageRecord, report: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> Target:
    state = record.state
    assert state.lineage is not None
    shape = state.lineage.shape
    config = next((configs[name] for name in state.attempts if name in configs), {})
    incidents = report["incidents"]
    tags = {
        "opt.kind": "lineage",
        "opt.status": str(state.status),
        "opt.cause": state.why,
        "opt.step": str(report["step"]),
        "opt.goodput": percent(report["goodput"]["goodput"]),
        "opt.incidents": str(len(incidents)),
        "opt.drills": str(sum(row["drill"] is not None for row in incidents)),
        "mlflow.note.content": note(report, front(report, None), TAG_LIMIT),
    }
    asked = {
        "recipe": state.lineage.recipe,
        "set": " ".join(state.lineage.settings),
        "nodes": str(shape.nodes),
        "spares": str(shape.spares),
        "ranks_per_node": str(shape.ranks_per_node),
    }
    return Target(
        name=record.lineage,
        parent=None,
        status=_status(state),
        start=_ms(state.started_at),
        end=_ms(state.since) if state.ended else None,
        tags=_cut({**_common(record), **tags}),
        params={key: value for key, value in {**asked, **flatten(config)}.items() if value},
    )


def _child(record: LineageRecord, run: Run, configs: Mapping[str, Mapping[str, Any]]) -> Target:
    state = record.state
    attempts = [attempt for attempt in state.attempts.values() if attempt.run == run.name]
    config = next((configs[attempt.name] for attempt in attempts if attempt.name in configs), {})
    newest = run is state.run
    following = next((other for other in state.runs.values() if other.parent == run.name), None)
    left = max((a.ended_at for a in attempts if a.ended_at), default=following.planned_at if following else 0.0)
    broken = [
        f"{part.attempt} step {point.step}"
        for part in record.curves
        for point in part.points
        if part.run == run.name and not point.finite
    ]
    tags = {
        "opt.kind": "run",
        "opt.run": run.name,
        "opt.cause": run.cause,
        "opt.incident": run.incident or "",
        "opt.from_step": str(run.checkpoint.step if run.checkpoint else 0),
        "opt.lr_scale": f"{lr_scale(state, run.name):g}",
        "opt.status": str(state.status) if newest else f"left for {following.name}" if following else "left",
        "opt.attempts": " ".join(attempt.name for attempt in attempts),
        "opt.nodes": " ".join(sorted({node for attempt in attempts for node in attempt.nodes})),
        "opt.jobs": " ".join(dict.fromkeys(job for attempt in attempts for job in record.jobs[attempt.name])),
        "opt.not_finite": "; ".join(broken),
    }
    return Target(
        name=run.name,
        parent=record.lineage,
        status=_status(state) if newest else "KILLED",
        start=_ms(run.planned_at),
        end=(_ms(state.since) if state.ended else None) if newest else _ms(left),
        tags=_cut({**_common(record), **tags}),
        params=flatten(config),
    )


def _common(record: LineageRecord) -> dict[str, str]:
    state = record.state
    assert state.lineage is not None
    return {
        "opt.lineage": record.lineage,
        "opt.lineage_key": lineage_key(state),
        "opt.recipe": state.lineage.recipe,
        "opt.journal_seq": str(state.seq),
        "mlflow.user": state.lineage.author,
        "mlflow.source.name": f"opt-ops {__version__}",
        "mlflow.source.type": "JOB",
    }


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: text[:TAG_LIMIT] for key, text in tags.items()}


def _status(state: State) -> str:
    endings = {Status.COMPLETED: "FINISHED", Status.HALTED: "FAILED", Status.CANCELLED: "KILLED"}
    return endings.get(state.status, "RUNNING")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `settings.optim.peak_lr: 0.001`; MLflow's parameters are a flat map of texts.

    What belongs to an attempt rather than to its settings (its id, host and times, what it resumed from) is left out.
    """
    flat: dict[str, str] = {}
    for key, value in config.items():
        if not prefix and key in {"v", "attempt", "host", "ts", "resume"}:
            continue
        name = f"{prefix}{re.sub(r'[^A-Za-z0-9_. /-]', '_', key)}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[name[:250]] = text[:PARAM_LIMIT]
    return flat


# ---- points -----------------------------------------------------------------------------------------------------


def choice(report: Mapping[str, Any], attempt: str) -> Choice:
    """What is sent of an attempt: the rule, and the incidents that it met or recovers from."""
    total = report["total_steps"]
    windows: list[Window] = []
    for row in report["incidents"]:
        if row["attempt"] == attempt and row["step_failed"] is not None:
            begins = row["onset_step"] if row["onset_step"] is not None else row["step_failed"]
            windows.append((begins - AROUND, (row["last_step"] or row["step_failed"]) + AROUND))
        if row["next_attempt"] == attempt and row["step_resumed"] is not None:
            windows.append((row["step_resumed"], row["step_resumed"] + AROUND))
    ended = next(row for row in report["attempts"] if row["attempt"] == attempt)
    if ended["outcome"] != "running" and ended["last_step"] is not None:
        windows.append((ended["last_step"], ended["last_step"]))
    return Choice(every=1 if total is not None and total <= WHOLE else EVERY, windows=tuple(windows))


def step_of(line: Mapping[str, Any]) -> int | None:
    """The update that a telemetry line tells of; None where another trainer's line does not say what it must."""
    sound = isinstance(line.get("num_updates"), int) and isinstance(line.get("ts"), (int, float))
    return line["num_updates"] if sound else None


def news(
    lines: Iterable[Mapping[str, Any]], wanted: Choice, sent: int, before: Choice | None
) -> Iterator[tuple[int, list[Sample]]]:
    """Each of an attempt's telemetry lines by its number, with what of it is still to be sent, if anything.

    The first `sent` lines were gone through under the choice `before`: of them only what that one did not take.
    """
    for number, line in enumerate(lines, 1):
        step = step_of(line)
        if step is None or (number <= sent and (before is None or before.takes(step))):
            yield number, []
            continue
        evaluated = evaluations(line) if number > sent else []  # of every line, whatever the choice
        yield number, [*(samples(line) if wanted.takes(step) else []), *evaluated]


def samples(line: Mapping[str, Any]) -> list[Sample]:
    """A telemetry line's values. What is not finite is not sent: one infinity wrecks the axis of MLflow's chart."""
    return [
        Sample(key=key, value=float(value), timestamp=_ms(line["ts"]), step=line["num_updates"])
        for key in SERIES
        if isinstance(value := line.get(key), (int, float)) and math.isfinite(value)
    ]


def evaluations(line: Mapping[str, Any]) -> list[Sample]:
    """A telemetry line's losses on validation data, as `valid/<corpus>`; names in the letters that MLflow takes."""
    told = line.get("valid")
    return [
        Sample(key=_valid_key(corpus), value=float(loss), timestamp=_ms(line["ts"]), step=line["num_updates"])
        for corpus, loss in (told.items() if isinstance(told, Mapping) else ())
        if isinstance(loss, (int, float)) and math.isfinite(loss)
    ]


def _valid_key(corpus: Any) -> str:
    return "valid/" + (re.sub(r"[^A-Za-z0-9_. -]", "_", str(corpus))[:200].strip(". ") or "_")


def final_through(state: State) -> int | None:
    """The step up to which nothing will be trained again, as far as is known: None is all of them.

    A step is settled once a later checkpoint on the way to the present weights was verified and healthy.
    """
    if state.status is Status.COMPLETED:
        return None
    known = newest_good(state, state.run.name) if state.run else None
    return known.checkpoint.step if known else 0


def kept_samples(record: LineageRecord, total: int | None, after: int) -> Iterator[tuple[int, list[Sample]]]:
    """The settled curve beyond step `after`: a step, and its values."""
    through = final_through(record.state)
    every = max(1, math.ceil((total or 0) / SETTLED_POINTS))
    for _, point in kept_points(record.curves):
        if point.step <= after or (through is not None and point.step > through):
            continue
        line = {"ts": point.ts, "num_updates": point.step, "valid": point.valid}
        found = evaluations(line)
        if point.step % every == 0 or point.step == total:
            line |= {"loss": point.loss, "gnorm": point.gnorm, "lr": point.lr, "wps": point.wps}
            found += samples(line)
        if found:
            yield point.step, [replace(sample, key=f"settled/{sample.key}") for sample in found]


def resend_after(record: LineageRecord, step: int, attempts: int) -> int:
    """Where to go on with a curve that was sent up to `step` when there were so many attempts.

    An attempt that began since may have taken some of it back. MLflow cannot forget those points; the ones that replace
    them are sent beside them, and are the later ones by their times.
    """
    return min([step, *(part.start for part in record.curves[attempts:])])


def ledger_samples(report: Mapping[str, Any]) -> list[Sample]:
    """The parent's few numbers: what incidents have cost so far, and the goodput of a lineage that has ended."""
    closed = [row for row in report["incidents"] if row["closed"] and row["step_failed"] is not None]
    spent = {"steps_lost": 0.0, "seconds_down": 0.0}
    counted: dict[tuple[str, str], float] = {}  # what one attempt answers together was lost once
    found: list[Sample] = []
    for row in sorted(closed, key=lambda row: row["closed"]):
        at = _ms(from_iso(row["closed"]))
        for key in spent:
            answer = (row["next_attempt"] or row["incident"], key)
            before = counted.get(answer, 0.0)
            counted[answer] = max(before, row[key] or 0.0)
            spent[key] += counted[answer] - before
        found += [Sample(key=f"spent/{k}", value=v, timestamp=at, step=row["step_failed"]) for k, v in spent.items()]
    share = report["goodput"]["goodput"]
    if report["ended"] and share is not None:
        at = _ms(from_iso(report["ended"]))
        found.append(Sample(key="spent/goodput", value=share, timestamp=at, step=report["step"]))
    return found


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
