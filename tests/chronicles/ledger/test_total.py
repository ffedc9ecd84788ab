"""The bill: what each cause cost, what people had to do, the conventional carbon figure, and the sums over lineages."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from chronicles.ledger.by_cause import SpentOnKind
from chronicles.ledger.conventional import conventional
from chronicles.ledger.people import people
from chronicles.ledger.total import account, total
from chronicles.record import LineageRecord, load
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver, Outcome, Severity
from tests.chronicles.eventful import eventful
from tests.chronicles.told import START, Told

RATES = Rates(
    pue=1.25, kg_co2e_per_kwh=0.4, factor_source="a table", cost_per_kwh=0.1, cost_per_node_hour=2.0, gpu_tdp_watts=400
)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    told = eventful(tmp_path_factory.mktemp("runs") / "12")
    half = (told.now - START) / 2
    told.see(e.EnergyMetered(since=START + half, until=told.now, joules=3.6e9, gpus=24))
    return load(told.folder)


def totals(rows: tuple[SpentOnKind, ...], name: str) -> float:
    return math.fsum(getattr(row, name) for row in rows)


def test_causes_add_up_to_the_totals(record: LineageRecord):
    summary = account(record, RATES).summary
    found = {name: totals(summary.by_cause, name) for name in ("seconds", "node_hours", "kwh", "tco2e", "cost")}
    resources = summary.resources
    assert resources.kwh is not None, "the record has metered energy"
    expected = {"seconds": summary.wall_seconds} | {
        name: getattr(resources, name) for name in found if name != "seconds"
    }
    assert found == pytest.approx(expected, rel=1e-9)
    metered = summary.wall_seconds - totals(summary.by_cause, "unmetered_seconds")
    assert metered == pytest.approx(resources.metered_seconds, rel=1e-9)


def test_what_a_failure_cost_is_its_part_of_the_nodes_and_of_the_energy(told: Told):
    """Ten steps of ten seconds on two nodes, 40 s of standstill, ten more steps; the counters cover the second half."""
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 10)
    incident = told.incident("process_death", "rank 1 was killed", "12.00-a0", 10)
    told.decide(incident, Action.RESTART)
    told.see(e.AttemptEnded(attempt="12.00-a0", outcome=Outcome.FAILED, last_step=10, last_step_at=None, exits=()))
    told.now += 30
    told.launch("12.00-a1", None, incident).train("12.00-a1", 1, 20)
    told.close(incident)
    summary = account(load(told.folder), RATES).summary
    lost = next(row for row in summary.lost_by_kind if row.kind == "process_death")
    held = next(iter(load(told.folder).state.allocations.values()))
    assert lost.node_hours == pytest.approx(lost.seconds * len(held.nodes) / 3600)
    assert lost.cost == pytest.approx(lost.node_hours * RATES.cost_per_node_hour)
    assert lost.kwh is None, "nothing was metered"


def test_energy_that_nobody_metered_is_not_spread(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    since = told.now
    told.train("12.00-a0", 1, 50)
    told.see(e.EnergyMetered(since=since, until=told.now, joules=7.2e6, gpus=16))
    told.train("12.00-a0", 51, 100)
    rows = account(load(told.folder), RATES).summary.by_cause
    assert totals(rows, "kwh") == pytest.approx(2.0 * RATES.pue)
    kept = next(row for row in rows if row.kind == "training_kept")
    assert 0 < kept.unmetered_seconds < kept.seconds


def test_peoples_time_is_from_the_first_act_after_a_page_to_the_last_before_half_an_hour_of_silence(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 10)
    told.see(e.AlertIntended(alert="12/halted", severity=Severity.PAGE, title="stopped", body=""))
    begin = told.now
    for after, text in ((600, "looking"), (1200, "it is the switch"), (1200 + 1700, "mended"), (9000, "much later")):
        told.now = begin + after
        told.see(e.NoteAdded(request=f"r{after}", author="ann", target="12", text=text))
    assert people(load(told.folder), told.now).person_seconds == pytest.approx(2900 - 600, abs=2)
    told.see(e.DriverChanged(request="r1", author="bob", driver=Driver.OPERATOR, reason="a new NCCL"))
    told.now += 500
    told.see(e.DriverChanged(request="r2", author="bob", driver=Driver.DAEMON, reason=""))
    told.now += 500
    found = people(load(told.folder), told.now)
    assert found.person_seconds == pytest.approx(2300 + 500, abs=4)
    assert found.by_author["bob"] == 2


def test_the_wait_for_an_answer_is_counted_apart(record: LineageRecord):
    summary = account(record, RATES).summary
    assert summary.people.seconds_waited == pytest.approx(summary.seconds_by_phase["halted"], rel=0.05)
    assert summary.people.person_seconds < summary.people.seconds_waited


def test_the_conventional_figure_of_opt_175b():
    """992 GPUs for 34 days at 400 W and PUE 1.1 are 356 MWh; with 0.21 kg per kWh, the paper's 75 t."""
    figure = conventional(
        992 * 34 * 24, Rates(pue=1.1, gpu_tdp_watts=400, kg_co2e_per_kwh=0.21, factor_source="a table")
    )
    assert figure is not None
    assert figure.kwh == pytest.approx(356_000, rel=0.01)
    assert figure.tco2e == pytest.approx(75, rel=0.01)
    assert conventional(1.0, Rates()) is None, "nobody has told the power of the GPUs"
    unsourced = conventional(1.0, Rates(gpu_tdp_watts=400, kg_co2e_per_kwh=0.21))
    assert unsourced is not None
    assert unsourced.tco2e is None, "a number without a source is not printed"


def test_the_sums_over_lineages_tell_the_ends_apart(record: LineageRecord, tmp_path: Path):
    stopped = Told(tmp_path / "13")
    stopped.begin().plan("13.00").hold().launch("13.00-a0").train("13.00-a0", 1, 40)
    drill = stopped.incident("process_death", "rank 1 was killed", "13.00-a0", 40, drill="d001")
    stopped.decide(drill, Action.RESTART)
    ended = e.AttemptEnded(attempt="13.00-a0", outcome=Outcome.FAILED, last_step=40, last_step_at=None, exits=())
    stopped.see(ended, seconds=5)
    stopped.launch("13.00-a1", None, drill).train("13.00-a1", 1, 60)
    stopped.see(e.StopRequested(request="r1", author="eve", reason="wrong tokenizer"))
    stopped.see(e.LineageCancelled(request="r1", why="eve: wrong tokenizer"))
    accounts = [account(record, RATES), account(load(stopped.folder), RATES)]
    assert accounts[1].status is Status.CANCELLED
    summed = total(accounts, RATES)
    everything = summed.all.node_hours
    assert everything == pytest.approx(sum(sums.node_hours or 0.0 for sums in summed.by_end.values()), rel=1e-9)
    assert summed.share_abandoned == pytest.approx(
        (accounts[1].summary.resources.node_hours or 0.0) / (everything or 1.0)
    )
    assert totals(summed.by_cause, "seconds") == pytest.approx(sum(each.summary.wall_seconds for each in accounts))
    assert summed.people.by_author is not None
    assert summed.people.by_author["eve"] == 1
    assert total(accounts, RATES, names=False).people.by_author is None
    later = max(each.as_of or 0.0 for each in accounts) + 1
    assert total(accounts, RATES, since=later).lineages == 0
    assert 0 < (summed.share_drills or 0.0) < 1, "a drill took node-hours"


def test_the_conventional_figure_of_kept_updates_leaves_out_spares_and_lost_time(told: Told):
    """Twenty kept steps of ten seconds on two nodes, after ten that were discarded."""
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 10)
    told.see(e.AttemptEnded(attempt="12.00-a0", outcome=Outcome.FAILED, last_step=10, last_step_at=None, exits=()))
    told.launch("12.00-a1").train("12.00-a1", 1, 20)
    record = load(told.folder)
    resources = account(
        record, Rates(pue=1.1, gpu_tdp_watts=400, kg_co2e_per_kwh=0.21, factor_source="a table")
    ).summary.resources
    summary = account(record, RATES).summary
    hours = summary.seconds_by_phase["training_kept"] / 3600 * len(record.state.attempts["12.00-a1"].nodes)
    gpus = (resources.gpu_hours or 0.0) / (resources.node_hours or 1.0)
    assert hours > 0
    assert resources.conventional_kwh == pytest.approx(hours * gpus * 0.4 * 1.1)
    assert resources.conventional_tco2e == pytest.approx(hours * gpus * 0.4 * 1.1 * 0.21 / 1000)
    assert resources.conventional is not None
    assert resources.conventional_kwh < resources.conventional.kwh
