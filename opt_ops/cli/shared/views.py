"""What commands show of a lineage, as rows of plain JSON values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from opt_ops.cli.shared import standing, wording
from opt_ops.cli.shared.foreseen import NOTHING, WHILE_SAVING, Foreseen, Loss
from opt_ops.cli.shared.output import Column
from opt_ops.cli.shared.standing import Finding, Newest, newest
from opt_ops.core.codec import encode
from opt_ops.core.decide.sizing import recommend
from opt_ops.core.detect.point import Point
from opt_ops.core.events import KINDS, Entry
from opt_ops.core.names import attempt_folder, lineage_of
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.data import changes_of
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import planned_rows
from opt_ops.core.state.queries import held_back, lr_scale, newest_good, open_proposals, total_steps
from opt_ops.core.state.status import IllegalTransition
from opt_ops.core.text import age, iso, moment
from opt_ops.core.told import told, words
from opt_ops.core.values import Driver
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import lineages
from opt_ops.runfolder.fields import BadField
from opt_ops.runfolder.liveness import Watch
from opt_ops.runfolder.telemetry import point_of, points

if TYPE_CHECKING:
    from chronicles.report.model import IncidentReport

_T = TypeVar("_T")

RUN_COLUMNS = [
    Column("RUN", "run"),
    Column("PARENT", "parent"),
    Column("FROM", "from_step", right=True),
    Column("LR", "lr_scale", right=True),
    Column("CAUSE", "cause"),
]
PLANNED_COLUMNS = [Column("FROM STEP", "step", right=True), Column("PLANNED", "what"), Column("BY", "by")]
ATTEMPT_COLUMNS = [
    Column("ATTEMPT", "attempt"),
    Column("OUTCOME", "shown"),
    Column("NODES", "nodes"),
    Column("GEN", "generation", right=True),
    Column("FROM", "from_step", right=True),
    Column("TO", "last_step", right=True),
    Column("LOGS", "logs"),
]
INCIDENT_COLUMNS = [
    Column("INCIDENT", "incident"),
    Column("KIND", "kind"),
    Column("DRILL", "drill"),
    Column("CAUSE", "cause"),
    Column("ACTION", "action"),
    Column("LOST", "steps_lost", right=True),
    Column("DOWN s", "seconds_down", right=True),
    Column("PROVEN", "proven"),
]
SUGGESTION_COLUMNS = [
    Column("RAN", "ran"),
    Column("FAILURES", "failures", right=True),
    Column("OF NODES", "node_failures", right=True),
    Column("BETWEEN", "between"),
    Column("SAVE s", "save_seconds", right=True),
    Column("SAVE EVERY", "interval"),
    Column("SPARES", "spares", right=True),
]
EVENT_COLUMNS = [
    Column("SEQ", "seq", right=True),
    Column("TIME", "ts"),
    Column("KIND", "kind"),
    Column("WHAT", "text"),
    Column("FIELDS", "shown", wide=True),
]


_EVALUATION_BYTES = 2**20  # the last evaluation is searched in so many bytes: some thousand updates


def newest_point(path: Path, attempt: Attempt | None) -> Point | None:
    """The attempt's last telemetry line, as a point; None if there is none, or if it is not as promised."""
    return _point(newest(path, attempt))


def _point(found: Newest) -> Point | None:
    try:
        return point_of(found.line) if found.line else None
    except BadField:  # another trainer writes these lines; a view shows what it can
        return None


def newest_evaluation(path: Path, attempt: Attempt | None) -> dict[str, Any] | None:
    """Step and losses, by corpus, of the attempt's last evaluation; None if there is none near the end."""
    if attempt is None:
        return None
    found = points(path / attempt_folder(attempt.name) / "telemetry.jsonl", _EVALUATION_BYTES)
    known = [point for point in found if point.valid]
    return {"step": known[-1].step, "losses": known[-1].valid} if known else None


def lineage_row(path: Path, state: State, watch: Watch) -> dict[str, Any]:
    """A lineage as a row of `opt-ops q`: its status, how old that is, and who watches."""
    now, attempt = watch.now, state.attempt
    jobs = [allocation.job for allocation in state.live_allocations if allocation.job]
    found = newest(path, attempt)
    wrong = standing.findings(path, state, watch, found)
    point = _point(found)
    steps = total_steps(state)
    since_step = None if found.at is None else round(max(0.0, now - found.at), 1)
    return {
        "lineage": path.name,
        "run": state.run.name if state.run else None,
        "state": str(state.status),
        "shown": standing.shown(state, wrong),
        "watched": None if state.ended else watch.over(path.name).watched,
        "findings": [each.row() for each in wrong],
        "job": ",".join(jobs) or None,
        "nodes": len(attempt.nodes) if attempt and attempt.live else None,
        "step": found.step,
        "steps": steps,
        "progress": f"{found.step}/{steps}" if steps and found.step is not None else None,
        "step_at": iso(found.at),
        "step_age": None if found.at is None else age(now - found.at),
        "step_age_seconds": since_step,
        "data_age_seconds": since_step,
        "usual_step_seconds": found.usual_seconds or None,
        "loss": point.loss if point else None,
        "lr": point.lr if point and found.line and found.line.get("lr") is not None else None,
        "wps": point.wps if point else None,
        "tflops": standing.finite(found.line.get("tflops")) if found.line else None,
        "checkpoint": newest_good_step(state),
        "restarts": max(0, len(state.attempts) - 1),
        "generation": attempt.generation if attempt else None,
        "standby": in_place.standbys(state),
        "evaluates": state.evaluation.checkpoint if state.evaluation else None,
        "evaluates_on": state.evaluation.intended.node if state.evaluation else None,
        "since": iso(state.since) if state.since else None,
        "ended_at": iso(state.since) if state.since and state.ended else None,
        "age": age(now - state.since) if state.since else None,
        "reason": _reason(state, wrong),
        "driver": str(state.driver),
        "proposals": [each.name for each in open_proposals(state)],
        "author": state.lineage.author if state.lineage else None,
        "recipe": state.lineage.recipe if state.lineage else None,
        "settings": list(state.lineage.settings) if state.lineage else [],
        "init_from": state.lineage.init_from if state.lineage else None,
        "parent": dataclasses.asdict(state.lineage.parent) if state.lineage and state.lineage.parent else None,
    }


UNREADABLE = "UNREADABLE"
WATCHED = "only watched (shadow)"
"""Of a training that another launcher runs: nothing is touched, and decisions are advice."""


def lineage_rows(paths: Sequence[Path], watch: Watch) -> list[dict[str, Any]]:
    """A row for each lineage; of one that cannot be read, with the reason."""
    rows, unreadable = by_lineage(paths, lambda path: lineage_row(path, lineages.state(path), watch))
    for row in rows:
        forks = (each["lineage"] for each in rows if each["parent"] and each["parent"]["lineage"] == row["lineage"])
        row["children"] = [*forks]
    known = {row["lineage"]: row for row in rows} | {
        name: _unreadable_row(name, why) for name, why in unreadable.items()
    }
    return [known[path.name] for path in paths]


def _unreadable_row(name: str, why: str) -> dict[str, Any]:
    finding = Finding(finding="unreadable", why=why, next=f"opt-ops run show {name}")
    return {"lineage": name, "state": UNREADABLE, "shown": UNREADABLE, "findings": [finding.row()], "reason": why}


def by_lineage(paths: Sequence[Path], work: Callable[[Path], _T]) -> tuple[list[_T], dict[str, str]]:
    """Do the same for each lineage. Returns what was made, and why it could not be made, by lineage.

    The guard is broad on purpose: whatever is wrong with one lineage must not hide the others. The reason is printed
    in the lineage's own row, and the command leaves with 5.
    """
    done: list[_T] = []
    failed: dict[str, str] = {}
    for path in paths:
        try:
            done.append(work(path))
        except Exception as error:  # noqa: BLE001
            failed[path.name] = str(error) if isinstance(error, OptOpsError | OSError) else f"unexpected {error!r}"
    return done, failed


def _reason(state: State, wrong: Sequence[Finding]) -> str:
    """What people must know beside the status: why it cannot be trusted, and what is open."""
    if state.ended:
        return f"{WATCHED}; {state.why}" if state.driver is Driver.SHADOW else state.why
    open_incidents = [i for i in state.incidents.values() if i.closed_at is None]
    reasons = [WATCHED] if state.driver is Driver.SHADOW else []
    reasons += [f"{each.name} needs an answer by {_hour(each.made.deadline)}" for each in open_proposals(state)]
    if (left := held_back(state)) is not None:
        reasons += [f"{left.name} was declined: nothing is started until it is resumed"]
    reasons += [each.why for each in wrong if each.doubt]
    reasons += [f"{open_incidents[-1].name} {words.without_codes(open_incidents[-1].cause)}"] if open_incidents else []
    reasons += [f"{each.finding}: {each.why}" for each in wrong if each.finding.startswith("alert")][:2]
    return "; ".join(reasons)


def _hour(ts: float) -> str:
    return moment(ts).strftime("%H:%MZ")


def lineage_view(path: Path, state: State, incidents: Sequence[dict[str, Any]], watch: Watch) -> dict[str, Any]:
    """A lineage as `opt-ops run show` prints it. `incidents` are rows of its report."""
    row = {**lineage_row(path, state, watch), "children": lineages.children(path)}
    running = "running?" if row["shown"] != row["state"] else "running"
    return {
        "lineage": row,
        "valid": newest_evaluation(path, state.attempt),
        "left_out": [{**dataclasses.asdict(each), "text": each.text} for each in state.left_out.values()],
        "failing": [
            {"watcher": name, "why": each.why, "since": iso(each.since)} for name, each in state.failing.items()
        ],
        "runs": [
            {
                "run": run.name,
                "parent": run.parent,
                "from_step": run.checkpoint.step if run.checkpoint else 0,
                "lr_scale": lr_scale(state, run.name),
                "data": [{"after_step": step, "what": what} for step, what in changes_of(state, run)],
                "cause": run.cause,
                "planned": iso(run.planned_at),
            }
            for run in state.runs.values()
        ],
        "attempts": [
            {
                "attempt": attempt.name,
                "outcome": str(attempt.outcome) if attempt.outcome else "running",
                "shown": str(attempt.outcome) if attempt.outcome else running,
                "nodes": list(attempt.nodes),
                "generation": attempt.generation,
                "from_step": attempt.checkpoint.step if attempt.checkpoint else 0,
                "last_step": attempt.last_step,
                "started": iso(attempt.started_at),
                "ended": iso(attempt.ended_at),
                "logs": str(path / attempt_folder(attempt.name) / "logs"),
            }
            for attempt in state.attempts.values()
        ],
        "planned": planned_rows(state),
        "incidents": incidents,
    }


def in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """A run or an incident for people: words in place of codes. Programs get the row as it is."""
    known = dict(row)
    if known.get("kind"):
        known["kind"] = words.failure(known["kind"])
    if known.get("action"):
        known["action"] = words.action(known["action"])
    return known | {"cause": words.without_codes(known["cause"])}


def concerns(incident: IncidentReport, identifier: str) -> bool:
    """Whether the identifier names an incident, its lineage, or a run or attempt that it hit or led to."""
    attempts = (incident.attempt, incident.next_attempt)
    runs = (incident.run_before, incident.run_after)
    return identifier in (incident.incident, lineage_of(incident.incident), *attempts, *runs)


def event_row(entry: Entry, known: State | None = None) -> dict[str, Any]:
    """A journal entry as a row: its fields as they are, and the sentence that tells it.

    Args:
        entry: The entry.
        known: The state before it.
    """
    fields = encode(entry.event)
    kind = fields.pop("kind")
    text = told(entry.event, known)
    row = {"seq": entry.seq, "epoch": entry.epoch, "ts": iso(entry.ts), "kind": kind, "fields": fields}
    return row | {"text": text, "what": text}


def with_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of an event with `key=value` of the fields that say something, for `-o wide`."""
    usual = {field.name: field.default for field in dataclasses.fields(KINDS[row["kind"]])}
    said = {
        key: value for key, value in row["fields"].items() if value not in (None, "", [], {}) and value != usual[key]
    }
    return {**row, "shown": wording.pairs(said)}


class EventRows:
    """The rows of a journal's events, told with the state before each."""

    def __init__(self) -> None:
        self.seq = 0
        self.state: State | None = State()

    def of(self, entries: Iterable[Entry], wanted: Callable[[Entry], bool]) -> list[dict[str, Any]]:
        """The rows of the entries that are wanted. Entries that were given before are passed over."""
        rows: list[dict[str, Any]] = []
        for entry in entries:
            if entry.seq <= self.seq:
                continue
            self.seq = entry.seq
            if wanted(entry):
                rows.append(event_row(entry, self.state))
            try:
                self.state = fold(self.state, entry) if self.state is not None else None
            except IllegalTransition:  # a journal of another version: told without the state, never not at all
                self.state = None
        return rows


def lost_steps(path: Path, state: State, to: int | None = None) -> int:
    """The number of steps that no good checkpoint holds; with `to`, no good one at or before that step."""
    return max(0, (newest_step(path, state) or 0) - (newest_good_step(state, to) or 0))


def newest_step(path: Path, state: State) -> int | None:
    """The newest step of the attempt that telemetry shows, else that the journal knows."""
    point = newest_point(path, state.attempt)
    return point.step if point else state.attempt.last_step if state.attempt else None


def loss(path: Path, state: State, steps: int, since: str = "") -> Loss:
    """So many steps, and what they have cost at the present pace. `since`: which ones."""
    point, attempt = newest_point(path, state.attempt), state.attempt
    if not steps or point is None or attempt is None:
        return Loss(steps=steps, since=since)
    return Loss(steps=steps, seconds=steps * point.step_seconds, nodes=len(attempt.nodes), since=since)


def loss_of(path: Path, state: State, coming: Sequence[Foreseen]) -> Loss:
    """What would be discarded by what would happen: training goes on until it is ended, and behind a checkpoint."""
    fields = {each.kind: each.fields for each in coming}
    if "leave_intended" in fields:
        return WHILE_SAVING
    if begun := fields.get("run_planned") or fields.get("attempt_intended"):
        checkpoint = begun["checkpoint"]
        steps = max(0, (newest_step(path, state) or 0) - (checkpoint["step"] if checkpoint else 0))
        return loss(path, state, steps, " behind that checkpoint")
    if "stop_intended" in fields:
        return loss(path, state, lost_steps(path, state), " since the newest good checkpoint")
    return NOTHING


def newest_good_step(state: State, before: int | None = None) -> int | None:
    """The step of the newest good checkpoint, at or before step `before`; None if there is none."""
    good = newest_good(state, state.run.name, before) if state.run else None
    return good.checkpoint.step if good else None


def findings(path: Path, state: State, watch: Watch) -> list[dict[str, str]]:
    """What is wrong with a lineage now, with the next command. Of an ended lineage only a halt is wrong."""
    return [each.row() for each in standing.findings(path, state, watch, newest(path, state.attempt))]


def suggestion(path: Path, state: State, repair_hours: float, now: float) -> dict[str, Any]:
    """The recommended save interval and number of spares, from the lineage's own record."""
    held_up = [
        point.save_seconds
        for attempt in list(state.attempts.values())[-3:]
        for point in points(path / attempt_folder(attempt.name) / "telemetry.jsonl")
        if point.save_seconds
    ]
    advice = recommend(state, median(held_up) if held_up else None, repair_hours, now)
    known = advice.running_seconds > 0
    return {
        "ran_seconds": advice.running_seconds,
        "ran": age(advice.running_seconds),
        "failures": advice.failures,
        "node_failures": advice.node_failures,
        "seconds_between_failures": advice.seconds_between_failures if known else None,
        "between": age(advice.seconds_between_failures) if known else None,
        "save_seconds": advice.save_seconds,
        "interval_seconds": advice.interval_seconds,
        "interval": age(advice.interval_seconds) if advice.interval_seconds else None,
        "spares": advice.spares,
        "repair_hours": repair_hours,
    }


def not_suggested(row: Mapping[str, Any]) -> Iterator[str]:
    """Why a suggestion lacks a number."""
    if row["interval"] is None and row["save_seconds"] is None:
        yield "no save interval is suggested: no attempt has told how long a save holds training up"
    if row["spares"] is None:
        yield "no spares are suggested: that takes a day of training, or three failures"
    elif row["interval"] is None and row["save_seconds"] is not None:
        yield "no save interval is suggested: nothing has been trained yet"
