"""The ledger in numbers: what counts as a failure, a restart, a call; what held nodes and energy come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chronicles.ledger import prometheus
from chronicles.ledger.summary import summarize
from chronicles.ledger.wall_clock import Stage, ledger
from chronicles.record import LineageRecord, load
from chronicles.report.encode import encode
from opt_ops.config import Rates
from opt_ops.core import events as e
from opt_ops.core.values import Action, Outcome
from tests.chronicles.eventful import eventful
from tests.chronicles.told import Told


def account(record: LineageRecord, rates: Rates | None = None) -> dict[str, Any]:
    """As programs read it."""
    return encode(summarize(record, rates))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eventful(tmp_path_factory.mktemp("runs") / "12").folder


@pytest.fixture(scope="module")
def counted(folder: Path) -> dict[str, Any]:
    return account(load(folder))


def test_every_restart_is_of_one_kind(counted: dict[str, Any]):
    ways = {way: counted[f"restarts_{way}"] for way in ("automatic", "manual", "planned")}
    assert ways == {"automatic": 4, "manual": 4, "planned": 2}
    assert counted["restarts"] == sum(ways.values())
    assert counted["requeues"] == 4, "jobs 4102 to 4105"


def test_a_halt_is_a_call_and_a_wish_is_none(counted: dict[str, Any]):
    assert counted["calls"] == 1
    assert counted["longest_hands_off_seconds"] > 3 * 3600, "the pause that a person chose is no call"


def test_lost_seconds_add_up_in_every_division(counted: dict[str, Any]):
    phases = counted["seconds_by_phase"]
    outside = counted["wall_seconds"] - phases["training_kept"]
    assert sum(row["seconds"] for row in counted["lost_by_kind"]) == pytest.approx(outside)
    assert sum(counted["seconds_by_stage"].values()) == pytest.approx(outside)
    assert counted["seconds_by_stage"]["repeating"] == pytest.approx(phases["training_lost"])
    assert counted["seconds_by_stage"]["waiting"] >= phases["paused"] + phases["halted"]


def hit(told: Told) -> Told:
    """Trained to 100 at a second a step, dead, seen after 5, decided after 2, ended after 3, asked again after 20."""
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 100)
    point = told.save("12.00", 80)
    told.now += 2.5  # the save took two; half a second is the incident's own
    incident = told.incident("process_death", "rank 1 was killed", "12.00-a0", 100)
    told.now += 1.9
    told.decide(incident, Action.RESTART)
    told.now += 3
    told.see(e.AttemptEnded(attempt="12.00-a0", outcome=Outcome.FAILED, last_step=100, last_step_at=None, exits=()))
    told.now += 19
    told.launch("12.00-a1", point, incident).train("12.00-a1", 81, 130)
    return told.close(incident)


def test_the_stages_of_a_standstill_follow_each_other(told: Told):
    record = load(hit(told).folder)
    spent = ledger(record).lost["12-i000"]
    assert spent[Stage.SEEING] == pytest.approx(4, abs=0.01), "from the last update"
    assert spent[Stage.DECIDING] == pytest.approx(2, abs=0.01)
    assert spent[Stage.ENDING] == pytest.approx(4, abs=0.01)
    assert spent[Stage.QUEUEING] == pytest.approx(20, abs=0.01)
    assert spent[Stage.LOADING] == pytest.approx(
        record.state.attempts["12.00-a1"].first_step_at - record.state.attempts["12.00-a1"].intended_at
    )  # type: ignore[operator]
    assert spent[Stage.REPEATING] == pytest.approx(20), "updates 81 to 100"


def test_failures_and_recoveries(told: Told):
    spent = account(load(hit(told).folder))
    incident = told.state.incidents["12-i000"]
    assert (spent["failures"], spent["recoveries"]) == (1, 1)
    assert spent["mtbf_seconds"] == pytest.approx(99 + 49), "the first step of an attempt is part of its start"
    assert spent["mttr_seconds"] == incident.seconds_down
    assert spent["ettr"] == pytest.approx(spent["seconds_by_phase"]["training_kept"] / spent["wall_seconds"])


def test_a_drill_is_no_failure_but_its_recovery_counts(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    incident = told.incident("process_death", "killed", "12.00-a0", 50, drill="d000")
    told.decide(incident, Action.RESTART).end("12.00-a0", Outcome.STOPPED, 50)
    told.launch("12.00-a1", None, incident).train("12.00-a1", 1, 60).close(incident)
    spent = account(load(told.folder))
    assert (spent["failures"], spent["mtbf_seconds"], spent["recoveries"]) == (0, None, 1)


def test_the_healthy_step_is_what_the_journal_says_of_steps(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    for step in range(100, 1100, 100):
        told.now += 400
        told.see(
            e.AttemptProgressed(
                attempt="12.00-a0",
                first_step=1,
                first_step_at=told.now - 399 if step == 100 else told.state.attempts["12.00-a0"].first_step_at or 0.0,
                step=step,
                at=told.now,
                step_seconds=2.0 if step > 100 else 1.5,
                save_seconds=50.0,
                evaluation_seconds=100.0,
            ),
            seconds=0.0,
        )
    spent = account(load(told.folder), Rates(ideal_step_seconds=1.0))
    assert spent["healthy_step_seconds"] == pytest.approx(2.0 + 1000 / 999), "the median, and evaluation's share"
    assert spent["seconds_saving"] == 500.0
    assert spent["goodput"] == pytest.approx(1000 * spent["healthy_step_seconds"] / spent["wall_seconds"])
    assert spent["share_of_ideal"] == pytest.approx(1000 / spent["wall_seconds"])
    assert account(load(told.folder))["ideal_step_seconds"] == 1.5, "the fastest twentieth"


def test_energy_and_money_by_the_sites_factors(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 100)
    for since in (0.0, 600.0):
        told.see(e.EnergyMetered(since=since, until=since + 600, joules=3.6e6, gpus=16))
    rates = Rates(pue=1.5, kg_co2e_per_kwh=0.4, factor_source="a table", cost_per_kwh=0.2, cost_per_node_hour=10.0)
    spent = account(load(told.folder), rates)
    assert (spent["gpu_kwh"], spent["kwh"], spent["metered_seconds"]) == (2.0, 3.0, 1200.0)
    assert spent["tco2e"] == pytest.approx(0.0012)
    assert spent["cost"] == pytest.approx(0.6 + 10 * spent["node_hours"])
    bare = account(load(told.folder))
    assert (bare["tco2e"], bare["cost"]) == (None, None), "no factor, no product"


def test_node_hours_are_of_all_held_nodes(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 100)
    spent = account(load(told.folder))
    since = next(x.ts for x in load(told.folder).entries if isinstance(x.event, e.AllocationChanged))
    assert spent["node_hours"] == pytest.approx(3 * (told.now - since) / 3600), "two that train, and a spare"


def test_the_ledger_needs_no_telemetry(told: Told):
    folder = hit(told).folder
    with_it = account(load(folder))
    for path in folder.glob("*/*/telemetry.jsonl"):
        path.unlink()
    assert account(load(folder)) == account(load(folder, telemetry=False)) == with_it


def test_prometheus_reads_it(folder: Path):
    text = prometheus.text({'12"\n\\': summarize(load(folder))})
    lines = text.splitlines()
    assert text.endswith("\n")
    kinds = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)), "one family, one TYPE"
    samples = [line for line in lines if not line.startswith("#")]
    assert all(line.startswith("opt_ops_") and 'lineage="12\\"\\n\\\\"' in line for line in samples)
    assert all(float(line.rsplit(" ", 1)[1]) >= 0 for line in samples)
    assert prometheus.text({}) == ""


def test_a_lineage_that_nobody_has_started(tmp_path: Path):
    spent = account(load(tmp_path))
    assert (spent["goodput"], spent["node_hours"], spent["calls"], spent["mtbf_seconds"]) == (None, None, 0, None)
    assert "opt_ops_goodput_ratio" not in prometheus.text({"1": summarize(load(tmp_path))})
