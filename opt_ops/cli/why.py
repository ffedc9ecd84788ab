"""`opt-ops why`: the newest incident, in six lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from opt_ops.cli.shared import views
from opt_ops.cli.shared.options import FormatOption, IdArgument, Lineage, lineage_folder, require_known, watch_now
from opt_ops.cli.shared.output import Column, Format, show, wrapped
from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.state.status import Status
from opt_ops.core.text import age, clock, duration, iso, printable
from opt_ops.core.told import told
from opt_ops.core.told.phrase import count
from opt_ops.runfolder.liveness import Watcher

if TYPE_CHECKING:
    from chronicles.record import LineageRecord
    from chronicles.report.model import IncidentReport


def why(identifier: IdArgument, output: FormatOption = Format.TABLE) -> None:
    """Say in six lines what happened last, why, and what it cost.

    It is the newest incident of a lineage, run or attempt, or the one that is named: what it was, since when, what was
    done and why, what it cost, where it stands, and the two commands that are likely next. `opt-ops explain` has the
    evidence.

    Examples:
      opt-ops why
      opt-ops why 12-i003
    """
    from chronicles.record import load
    from chronicles.report.incident import incidents

    path = lineage_folder(identifier)
    record = load(path, telemetry=False)
    require_known(identifier, Lineage(path, record.state))
    concerned = [each for each in incidents(record) if views.concerns(each, identifier)]
    newest = concerned[-1] if concerned else None
    rows = [_row(newest, record)] if newest else []
    if output is not Format.TABLE and output is not Format.WIDE:
        show("opt-ops/why/1", rows, [Column("INCIDENT", "incident")], output)
        return
    if newest:
        for line in _lines(rows[0], float(newest.opened)):
            print("\n".join(wrapped(printable(line), 9)))
    else:
        since = f" since {clock(record.started)}, when it was started" if record.started else ""
        print(f"{identifier}: nothing has happened{since}. It is {record.state.status}.")


def _row(incident: IncidentReport, record: LineageRecord) -> dict[str, Any]:
    """What happened, in words; times are UTC."""
    name = incident.incident
    events = [entry.event for entry in record.entries]
    opened = next(told(each) for each in events if isinstance(each, e.IncidentOpened) and each.incident == name)
    decided = [each for each in events if isinstance(each, e.RecoveryDecided) and each.incident == name]
    did = told(decided[-1]).removeprefix(f"{name}: ") if decided else _undecided(incident)
    closed = [told(each) for each in events if isinstance(each, e.IncidentClosed) and each.incident == name]
    stands = closed[-1].removeprefix(f"{name} ") if closed else "not over yet"
    watcher = watch_now().over(record.lineage)
    return {
        "incident": name,
        "what": opened,
        "since": iso(float(incident.opened)),
        "did": did,
        "why": incident.why,
        "cost": _cost(incident),
        "stands": f"{stands}; lineage {record.lineage} is {_standing(record.state, watcher)}",
        "next": list(dict.fromkeys(_likely(incident, record, watcher)))[:2],
    }


def _undecided(incident: IncidentReport) -> str:
    from chronicles.logbook.entries.asked import asked

    return f"nothing yet. {asked(incident)}" if incident.proposals else "nothing is decided yet"


def _cost(incident: IncidentReport) -> str:
    if incident.steps_discarded is None and incident.seconds_down is None:
        return "not known yet"
    steps, seconds, hours = incident.steps_discarded, incident.seconds_down, incident.node_hours_lost
    parts = [
        *([f"{count(steps, 'step')} discarded"] if steps else []),
        *([f"{duration(seconds)} of downtime"] if seconds else []),
        *([f"{hours:.1f} node-hours"] if hours and hours >= 0.05 else []),
    ]
    return ", ".join(parts) or "nothing: no step and no downtime"


def _standing(state: State, watcher: Watcher) -> str:
    why = f": {state.why}" if state.status is Status.HALTED and state.why else ""
    unwatched = "" if state.ended or watcher.watched else "?, and nobody watches"
    return f"{state.status}{why}{unwatched}"


def _likely(incident: IncidentReport, record: LineageRecord, watcher: Watcher) -> Iterator[str]:
    """The commands that may be next, the likeliest first."""
    lineage, state = record.lineage, record.state
    if not state.ended and not watcher.watched:
        yield watcher.next
    for proposal in open_proposals(state):
        yield f"opt-ops run approve {proposal.name}"
        yield f"opt-ops run decline {proposal.name}"
    if state.status is Status.HALTED:
        yield f"opt-ops explain {incident.incident}"
        yield f"opt-ops run resume {lineage}"
    if incident.closed is None and not state.ended:
        yield f"opt-ops watch {lineage}"
    yield f"opt-ops explain {incident.incident}"
    if incident.proven is False and not state.ended:
        yield f"opt-ops run rollback {lineage} --dry-run"
    yield f"opt-ops logbook open {lineage}" if state.ended else f"opt-ops watch {lineage}"


def _lines(row: Mapping[str, Any], opened: float) -> Iterator[str]:
    yield row["what"]
    yield f"  since  {clock(opened)}, {age(time.time() - opened)} ago"
    yield f"  did    {row['did']}{'; ' + row['why'] if row['why'] else ''}"
    yield f"  cost   {row['cost']}"
    yield f"  now    {row['stands']}"
    yield f"  next   {'   or   '.join(row['next'])}"
