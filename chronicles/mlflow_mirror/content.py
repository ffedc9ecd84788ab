"""What MLflow should hold of a lineage: runs, tags, parameters and points. Pure; `sync` sends it.

A lineage is a parent run with the kept curve. Each of its runs is a child run with all that was trained. Everything,
times included, follows from journal, telemetry and the trainer's config.json, so sending it again adds nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from chronicles.kept_curve import kept_points
from chronicles.logbook.drawing.markdown import note
from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import front_page
from chronicles.logbook.story.build import story
from chronicles.mlflow_mirror import words
from chronicles.mlflow_mirror.parameters import Json, parameters
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport, LineageReport
from chronicles.wording import percent, when
from opt_ops import __version__
from opt_ops.core.state.attempts import Attempt, Run
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import lr_scale, newest_good
from opt_ops.core.state.status import Status
from opt_ops.core.text import printable_lines

EVERY = 10  # steps between two points that are sent
WHOLE = 2_000  # steps: of a lineage no longer than this, every point is sent
AROUND = 30  # steps before and after an incident: every point is sent
KEPT_POINTS = 2_000  # of the parent's curve, about: MLflow draws at most 2,500
TAG_LIMIT = 7_900  # characters, the note included; MLflow cuts tags at 8,000 without a warning

CORE = ("loss", "gnorm", "lr", "wps", "step_seconds")
SERIES = (*CORE, "actv_norm", "loss_scale", "tflops", "mfu", "cuda_gb_allocated")

Window = tuple[int, int]  # first and last step


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowRun:
    """A run as MLflow should show it. Times are milliseconds since the epoch."""

    name: str  # as people see it; it may change
    run: str  # `12.01`; empty for the lineage's own
    status: str  # RUNNING, FINISHED, FAILED or KILLED: MLflow has no others
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
    """Distinguishes this lineage from others of the same number, by the request that started it."""
    assert state.lineage is not None
    return re.sub(r"[^\w./-]", "_", f"{state.lineage.lineage}/{state.lineage.request}")


def mlflow_runs(record: LineageRecord, report: LineageReport, configs: Mapping[str, Json]) -> list[MlflowRun]:
    """The parent, then a child for each run. `configs` are the attempts' config.json, where there is one."""
    state = record.state
    runs = [_parent(record, report, configs), *(_child(record, report, run, configs) for run in state.runs.values())]
    return [replace(run, tags=_readable(run.tags), params=_readable(run.params)) for run in runs]


def _readable(texts: Mapping[str, str]) -> dict[str, str]:
    """Without control characters: a cause or a setting is what somebody else wrote, and MLflow shows it to all."""
    return {key: printable_lines(value) for key, value in texts.items()}


def _parent(record: LineageRecord, report: LineageReport, configs: Mapping[str, Json]) -> MlflowRun:
    state = record.state
    assert state.lineage is not None
    shape = state.lineage.shape
    config = next((configs[name] for name in state.attempts if name in configs), {})
    incidents = report.incidents
    told = story(record, report, entries(record, report))
    tags = {
        "opt.kind": "lineage",
        "opt.status": str(state.status),
        "opt.as_of": when(report.as_of),
        "opt.cause": state.why,
        "opt.step": str(report.step),
        "opt.goodput": percent(report.ledger.goodput),
        "opt.incidents": str(len(incidents)),
        **_story_tags(report, list(incidents)),
        "opt.state": str(state.status),
        "opt.outcome": words.outcome(report),
        "opt.parent": report.parent.run if report.parent else "",
        "opt.in_place": str(sum(row.in_place is True for row in incidents)),
        "mlflow.note.content": note(report, front_page(report, None), told, TAG_LIMIT),
    }
    requested = {
        "recipe": state.lineage.recipe,
        "set": " ".join(state.lineage.settings),
        "nodes": str(shape.nodes),
        "spares": str(shape.spares),
        "ranks_per_node": str(shape.ranks_per_node),
    }
    return MlflowRun(
        name=words.lineage_name(report),
        run="",
        status=_status(state),
        start=_ms(state.started_at),
        end=_ms(state.since) if state.ended else None,
        tags=_cut({**_common(record), **tags}),
        params=parameters(config, requested),
    )


def _child(record: LineageRecord, report: LineageReport, run: Run, configs: Mapping[str, Json]) -> MlflowRun:
    state = record.state
    attempts = [attempt for attempt in state.attempts.values() if attempt.run == run.name]
    config = next((configs[attempt.name] for attempt in attempts if attempt.name in configs), {})
    newest = run is state.run
    told = next(each for each in report.runs if each.run == run.name)
    following = next((other for other in state.runs.values() if other.parent == run.name), None)
    left = max((a.ended_at for a in attempts if a.ended_at), default=following.planned_at if following else 0.0)
    not_finite = [
        f"{curve.attempt} step {point.step}"
        for curve in record.curves
        for point in curve.points
        if curve.run == run.name and not point.finite
    ]
    tags = {
        "opt.kind": "run",
        "opt.run": run.name,
        "opt.cause": run.cause,
        "opt.incident": run.incident or "",
        "opt.from_step": str(run.checkpoint.step if run.checkpoint else 0),
        "opt.lr_scale": f"{lr_scale(state, run.name):g}",
        "opt.status": str(state.status) if newest else words.run_outcome(report, told, newest=newest),
        **_story_tags(report, words.rows_of(report, told)),
        "opt.state": str(state.status) if newest else "left",
        "opt.outcome": words.run_outcome(report, told, newest=newest),
        "opt.parent": run.parent or (report.parent.run if report.parent else ""),
        "opt.attempts": " ".join(attempt.name for attempt in attempts),
        "opt.generations": " ".join(f"{each.name}:{each.generation}" for each in attempts if each.members),
        "opt.nodes": " ".join(sorted({node for attempt in attempts for node in _nodes(attempt)})),
        "opt.jobs": " ".join(dict.fromkeys(job for attempt in attempts for job in record.jobs[attempt.name])),
        "opt.not_finite": "; ".join(not_finite),
    }
    return MlflowRun(
        name=words.run_name(report, told),
        run=run.name,
        status=_status(state) if newest else "FINISHED",  # it was left on purpose: that is no failure
        start=_ms(run.planned_at),
        end=(_ms(state.since) if state.ended else None) if newest else _ms(left),
        tags=_cut({**_common(record), **tags}),
        params=parameters(config),
    )


def _story_tags(report: LineageReport, rows: list[IncidentReport]) -> dict[str, str]:
    """What makes columns of MLflow's list of runs, of the lineage's or one run's incidents."""
    return {
        "opt.owner": report.author or "",
        "opt.last_incident": words.last_incident(rows),
        "opt.drills": str(sum(row.drill is not None for row in rows)),
    }


def _nodes(attempt: Attempt) -> set[str]:
    """All that took part in it, in any generation of its membership."""
    return {*attempt.nodes, *(node for members in attempt.members for node in members.before)}


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


# ---- points -----------------------------------------------------------------------------------------------------


def choice(report: LineageReport, attempt: str) -> Choice:
    """Which updates of an attempt are sent: by the rule, and around the incidents that it met or recovers from."""
    total = report.total_steps
    windows: list[Window] = []
    for row in report.incidents:
        if row.attempt == attempt and row.step_failed is not None:
            windows.append(((row.onset or 0) - AROUND, (row.last_step or row.step_failed) + AROUND))
        if row.next_attempt == attempt and row.step_resumed is not None:
            windows.append((row.step_resumed, row.step_resumed + AROUND))
    ended = next(row for row in report.attempts if row.attempt == attempt)
    if ended.outcome != "running" and ended.last_step is not None:
        windows.append((ended.last_step, ended.last_step))
    return Choice(every=1 if total is not None and total <= WHOLE else EVERY, windows=tuple(windows))


def step_of(line: Json) -> int | None:
    """The update that a telemetry line describes; None if another trainer's line lacks what is required."""
    sound = isinstance(line.get("num_updates"), int) and isinstance(line.get("ts"), (int, float))
    return line["num_updates"] if sound else None


def unsent(
    lines: Iterable[Json], wanted: Choice, sent: int, before: Choice | None
) -> Iterator[tuple[int, list[Sample]]]:
    """Number the telemetry lines of an attempt from 1, each with the samples that are still to be sent.

    Args:
        lines: All lines of the attempt.
        wanted: Which updates are to be sent.
        sent: So many lines were sent already, under the choice `before`: of them, only what that one did not take.
        before: The earlier choice, if there was one.
    """
    for number, line in enumerate(lines, 1):
        step = step_of(line)
        if step is None or (number <= sent and (before is None or before.takes(step))):
            yield number, []
            continue
        evaluated = evaluations(line) if number > sent else []  # of every line, by any choice
        yield number, [*(samples(line) if wanted.takes(step) else []), *evaluated]


def samples(line: Json) -> list[Sample]:
    """A telemetry line's values."""
    values = [*((key, line.get(key)) for key in SERIES), ("ops/tokens", line.get("tokens"))]
    return finite(values, line["ts"], line["num_updates"])


def evaluations(line: Json) -> list[Sample]:
    """A telemetry line's losses on validation data, as `valid/<corpus>` in the characters that MLflow accepts."""
    found = line.get("valid")
    losses = found if isinstance(found, Mapping) else {}
    return finite(_by_corpus(losses), line["ts"], line["num_updates"])


def _by_corpus(losses: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"valid/{key_part(str(corpus), 200)}", loss) for corpus, loss in losses.items()]


def key_part(name: str, longest: int) -> str:
    """A name in the characters that MLflow accepts in a part of a metric's key."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", name)[:longest].strip(". ") or "_"


def finite(values: Iterable[tuple[str, Any]], ts: float, step: int) -> list[Sample]:
    """The finite values as samples: one infinite value would make the axis of MLflow's chart useless."""
    return [
        Sample(key=key, value=float(value), timestamp=_ms(ts), step=step)
        for key, value in values
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]


def final_through(state: State) -> int | None:
    """The step up to which the kept curve can no longer change, as far as is known; None: all of it.

    A step is final once a later checkpoint on the way to the present weights is verified and healthy.
    """
    if state.status is Status.COMPLETED:
        return None
    known = newest_good(state, state.run.name) if state.run else None
    return known.checkpoint.step if known else 0


def kept_samples(record: LineageRecord, total: int | None, after: int) -> Iterator[tuple[int, list[Sample]]]:
    """The final part of the kept curve beyond step `after`: (step, samples)."""
    through = final_through(record.state)
    every = max(1, math.ceil((total or 0) / KEPT_POINTS))
    for _, point in kept_points(record.curves):
        if point.step <= after or (through is not None and point.step > through):
            continue
        values = _by_corpus(point.valid or {})
        if point.step % every == 0 or point.step == total:
            values += [("loss", point.loss), ("gnorm", point.gnorm), ("lr", point.lr), ("wps", point.wps)]
            values += [("ops/tokens", point.tokens or None)]
        # Losses on validation data stand beside the children's as well, under the children's name.
        keys = [(key, value) for key, value in values if "/" in key]
        keys += [(f"settled/{key}", value) for key, value in values if not key.startswith("ops/")]
        found = finite(keys, point.ts, point.step)
        if found:
            yield point.step, found


def resend_after(record: LineageRecord, step: int, attempts: int) -> int:
    """The step after which the kept curve must be sent, if it was sent up to `step` when there were `attempts`.

    Attempts that began later may have discarded part of it. MLflow cannot delete those points; the points that replace
    them are sent too, with later times.
    """
    return min([step, *(curve.start for curve in record.curves[attempts:])])


def ledger_samples(report: LineageReport) -> list[Sample]:
    """The parent's few numbers: what incidents have cost so far, and the goodput of a lineage that has ended."""
    spent = {"steps_lost": 0.0, "seconds_down": 0.0, "recoveries_in_place": 0.0}
    counted: dict[tuple[str, str], float] = {}  # incidents that one attempt answers share the same loss; it counts once
    found: list[Sample] = []
    closed = [(row.closed, row) for row in report.incidents if row.closed is not None]
    for at, row in sorted(closed, key=lambda pair: pair[0]):
        if row.step_failed is None:
            continue
        costs = {"steps_lost": row.steps_discarded or 0.0, "seconds_down": row.seconds_down or 0.0}
        costs["recoveries_in_place"] = float(row.in_place is True)
        for key, cost in costs.items():
            answer = (row.next_attempt or row.incident, key)
            before = counted.get(answer, 0.0)
            counted[answer] = max(before, cost)
            spent[key] += counted[answer] - before
        found += finite([(f"spent/{key}", value) for key, value in spent.items()], at, row.step_failed)
    if report.ended is not None and report.ledger.goodput is not None:
        found += finite([("spent/goodput", report.ledger.goodput)], report.ended, report.step)
    return found


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
