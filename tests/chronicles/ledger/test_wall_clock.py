"""Every second of the wall clock is in exactly one phase."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronicles.ledger.wall_clock import TimePhase, ledger
from chronicles.record import LineageRecord, load
from opt_ops.core.events import AttemptEnded, AttemptProgressed, LineageCancelled, LineageHalted, StopRequested
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Outcome
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told, spiked

RECORDED = load(LINEAGE)
START, END = RECORDED.started or 0.0, RECORDED.as_of or 0.0


def shuffled(skews: list[float], statuses: list[tuple[float, Status]], named: list[bool]) -> LineageRecord:
    """The recorded lineage with clocks that disagree, statuses that come at any time, and attempts of no incident."""
    shift = dict(zip(RECORDED.state.attempts, skews, strict=True))
    moved = [(START, Status.PLANNED), *((START + share * (END - START), status) for share, status in sorted(statuses))]
    attempts = {
        name: attempt if keep else dataclasses.replace(attempt, incident=None)
        for (name, attempt), keep in zip(RECORDED.state.attempts.items(), named, strict=True)
    }
    state = dataclasses.replace(RECORDED.state, attempts=attempts)
    entries = [dataclasses.replace(entry, event=skewed(entry.event, shift)) for entry in RECORDED.entries]
    return dataclasses.replace(RECORDED, entries=entries, statuses=moved, state=state)


def skewed(event: Any, shift: dict[str, float]) -> Any:
    if isinstance(event, AttemptProgressed):
        by = shift[event.attempt]
        return dataclasses.replace(event, first_step_at=event.first_step_at + by, at=event.at + by)
    if isinstance(event, AttemptEnded) and event.last_step_at is not None:
        return dataclasses.replace(event, last_step_at=event.last_step_at + shift[event.attempt])
    return event


@given(
    st.lists(st.floats(-300, 300), min_size=4, max_size=4),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(list(Status))), max_size=12, unique_by=lambda pair: pair[0]),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_phases_sum_to_the_wall_clock(skews: list[float], statuses: list[tuple[float, Status]], named: list[bool]):
    record = shuffled(skews, statuses, named)
    book = ledger(record)
    for phase, status in ((TimePhase.PAUSED, Status.PAUSED), (TimePhase.HALTED, Status.HALTED)):
        assert book.phases[phase] <= stood_in(record, status) + 1e-6
        assert book.downtime(phase) == book.phases[phase], "a person's wish is no incident's cost"
    assert math.isclose(sum(book.phases.values()), END - START, rel_tol=1e-9)
    assert min(book.phases.values()) >= 0
    stood = sum(book.phases[phase] for phase in TimePhase if phase not in (TimePhase.KEPT, TimePhase.LOST))
    assert math.isclose(sum(map(book.downtime, book.lost)), stood, rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(sum(map(book.repeated, book.lost)), book.phases[TimePhase.LOST], rel_tol=1e-9, abs_tol=1e-6)


def stood_in(record: LineageRecord, status: Status) -> float:
    ends = [*(ts for ts, _ in record.statuses[1:]), END]
    return sum(end - ts for (ts, each), end in zip(record.statuses, ends, strict=True) if each is status)


def test_standstill_agrees_with_what_the_incidents_were_closed_with():
    book = ledger(RECORDED)
    for incident in RECORDED.state.incidents.values():
        assert book.downtime(incident.name) == pytest.approx(incident.seconds_down, abs=0.01)


def test_phases_of_a_rollback(told: Told):
    record = load(spiked(told).folder)
    book = ledger(record)
    assert book.steps_kept == 140
    assert book.steps_repeated == 100
    assert book.healthy_step_seconds == 1.0
    assert book.phases[TimePhase.LOST] == pytest.approx(100)
    assert book.phases[TimePhase.KEPT] == pytest.approx(99 + 39), (
        "an attempt's first step ends the standstill before it"
    )
    assert book.repeated("12-i000") == book.phases[TimePhase.LOST]
    assert book.goodput == pytest.approx(140 / sum(book.phases.values()))


def test_waiting_for_a_human_is_a_phase_of_its_own(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.end("12.00-a0", Outcome.FAILED, 50)
    incident = told.incident("user_error", "no such recipe", "12.00-a0", 50)
    told.decide(incident, Action.HALT)
    told.see(LineageHalted(why="no such recipe", incident=incident))
    told.see(StopRequested(request="s", author="ann", reason="enough"), seconds=7200)
    told.see(LineageCancelled(request="s", why="ann: enough"))
    book = ledger(load(told.folder))
    assert book.phases[TimePhase.HALTED] == pytest.approx(7201, abs=0.1)


def test_nothing_to_account_for(tmp_path: Path):
    book = ledger(load(tmp_path))
    assert sum(book.phases.values()) == 0
    assert book.goodput is None
