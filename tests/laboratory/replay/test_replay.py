"""Scenarios, records and fault plans, and short replays with the real supervisor and the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from opt_ops.laboratory.replay import scenario as scenarios
from opt_ops.laboratory.replay.fault_plan import Stop, sample
from opt_ops.laboratory.replay.measure import mean_stop, measure
from opt_ops.laboratory.replay.oracle import Oracle
from opt_ops.laboratory.replay.play import play, world_of
from opt_ops.laboratory.replay.scenario import Scenario, ScenarioError, TraceRules
from opt_ops.laboratory.replay.sweep import replay, summary, variations
from opt_ops.laboratory.replay.trace import read as read_record
from opt_ops.laboratory.simulated.hosts import ReplacementNode
from opt_ops.runfolder.journal import read
from tests.laboratory.simulated_lineage import without_sync

RECORD = """date,run,kind,step_start,step_end,cause,row_is
2021-11-12,12.00,launch,0,,start,run start
2021-11-13,12.01,restart,500,,ECC,run start
2021-11-14,12.02,restart,,,unknown,run start
2021-11-15,12.03,segment-end,400,900,hardware,run end
2021-11-15,11.0,restart,100,,another lineage,run start
2021-11-16,12.04,experiment,,,people,run start
"""
RULES = TraceRules(runs=("12",), kinds={"restart": "stop", "segment-end": "stop"}, why_not={"experiment": "a choice"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)


def small(name: str = "opt-175b", **changes: object) -> Scenario:
    """A scenario of eight nodes and some hundred steps."""
    chosen = scenarios.load(name)
    tables = chosen.model_dump()
    tables["cluster"] |= {"nodes": 8, "spares": 2, "min_nodes": 5, "gpus_per_node": 2}
    tables["training"] |= {"steps": 1500, "evaluate_every": 0}
    tables["divergences"]["at"] = []
    tables |= {"in_place": None, "loss": None, "slow": None, "spikes": None, "vary": {}, **changes}
    return Scenario.model_validate(tables)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "incidents.csv"
    path.write_text(RECORD)
    return path


@pytest.mark.parametrize("path", sorted(scenarios.SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_scenarios_are_valid_and_say_where_their_numbers_come_from(path: Path):
    chosen = scenarios.load(path.stem)
    assert chosen.name == path.stem
    physical = chosen.physical.model_dump()
    assert all(len(each["source"]) > 3 for each in physical.values())
    sample(chosen, None, 1)


def test_a_scenario_with_a_mistake_is_refused_with_the_place(tmp_path: Path):
    text = (scenarios.SHIPPED / "quiet-week.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("nodes = 124", "nodes = -1", 1).replace("[spikes]", "[spices]"))
    with pytest.raises(ScenarioError, match=r"cluster\.nodes.*spices"):
        scenarios.load(str(path))
    with pytest.raises(ScenarioError, match="cannot be read") as missing:
        scenarios.load("no-such")
    assert "broken-recipe" in missing.value.hint


def test_a_record_is_read_and_what_it_does_not_say_is_drawn(record: Path):
    known = read_record(record, RULES)
    assert [(each.what, each.step) for each in known.incidents] == [("stop", 500), ("stop", None), ("stop", 900)]
    assert sum(known.left_out.values()) == 3
    fault_plans = [sample(small(), known, seed) for seed in (1, 1, 2)]
    listed = [[stop.step for stop in fault_plan.stops if stop.label] for fault_plan in fault_plans]
    assert listed[0] == listed[1] != listed[2]
    assert {500, 900} <= set(listed[0])
    assert 500 <= listed[0][1] <= 900, "between its neighbours"
    assert fault_plans[0].sampled["step of a stop"] == 1
    assert fault_plans[0].sampled["what stopped it"] == 3


def test_a_record_without_its_columns_is_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("date,kind\n")
    with pytest.raises(ScenarioError, match="no column"):
        read_record(path, RULES)


def test_a_record_saved_with_a_byte_order_mark_is_read_as_the_same_one_without(record: Path):
    before = read_record(record, RULES)
    record.write_bytes(b"\xef\xbb\xbf" + record.read_bytes())
    assert read_record(record, RULES) == before


def test_a_record_in_other_columns_is_refused_and_each_one_found_is_named(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("Day,run,Type,iteration,Reason,colour\n")
    with pytest.raises(ScenarioError) as refused:
        read_record(path, RULES)
    said = str(refused.value)
    for found, here in {"Day": "date", "Type": "kind", "iteration": "step_start", "Reason": "cause"}.items():
        assert f"`{found}` (here: {here})" in said
    assert "`colour` (not used here)" in said
    assert "`run`" not in said


def test_incidents_that_end_one_attempt_are_one_stop():
    def incident(name: str, attempt: str | None, cost: float) -> dict[str, object]:
        return {"incident": name, "attempt": attempt, "cost": cost}

    three = [incident(f"i{number}", "a7", 3000.0) for number in range(3)]
    assert mean_stop([*three, incident("i9", "a8", 1000.0)]) == 2000.0
    assert mean_stop([incident("i1", None, 10.0), incident("i2", None, 30.0)]) == 20.0
    assert mean_stop([]) is None


def test_a_week_in_which_nothing_happens_loses_saves_and_the_start_alone():
    chosen = small(stops=None)
    (found,) = replay(chosen, None, [1])
    assert found.status == "COMPLETED"
    assert found.goodput > 0.98
    assert found.incidents == []
    assert set(found.lost) <= {"saves", "downtime: start"}
    assert found.goodput <= (found.oracle_goodput or 0.0)


def test_stops_are_survived_and_nobody_beats_the_oracle(record: Path):
    chosen = small()
    found = replay(chosen, read_record(record, RULES), [1, 2])
    for each in found:
        assert each.status == "COMPLETED"
        assert each.steps == 1500
        assert 0.5 < each.goodput <= (each.oracle_goodput or 0.0) + 0.002
    assert len(found[0].incidents) >= 3
    figures = summary(found)
    assert figures["goodput_percent"]["least"] <= figures["goodput_percent"]["mean"]


def test_spares_that_are_varied_away_do_not_exist_for_anybody(record: Path):
    chosen = small(vary={"spares": [0, 2], "save_every": [7]})
    none, two, saves = variations(chosen)
    worlds = [world_of(each.scenario, sample(each.scenario, None, 1)) for each in (none, two)]
    assert [sum(node.up for node in world.cluster.nodes.values()) for world in worlds] == [8, 10]
    assert saves.scenario.training.save_every == 7
    for each in replay(none.scenario, read_record(record, RULES), [1, 2]):
        assert each.goodput <= (each.oracle_goodput or 0.0) + 0.002


def test_what_a_person_took_to_come_is_no_fault_of_the_supervisor(record: Path):
    chosen = small()
    stops = chosen.stops.model_dump() | {"needs_human": {"value": 1.0, "source": "a test"}} if chosen.stops else {}
    (found,) = replay(Scenario.model_validate(chosen.model_dump() | {"stops": stops}), read_record(record, RULES), [1])
    waited = [each for each in found.incidents if each["waited_for_person"]]
    assert found.person > 0.5 * sum(max(0.0, found.lost[name]) for name in found.lost if "downtime" in name)
    assert waited
    assert min(each["cost"] for each in waited) > 600
    assert found.hardware_stop is None or found.hardware_stop < 600


def test_a_broken_recipe_is_halted_with_a_page():
    chosen = small("broken-recipe", divergences={"at": [{"step": 600, "source": "a test"}], "cured_below": [0.0, 0.0]})
    (found,) = replay(chosen, None, [1])
    assert found.status == "HALTED"
    assert [title for _, title in found.pages] == ["opt-ops 12: HALTED, a human is needed"]
    rollbacks = [each for each in found.incidents if each["action"] == "rollback"]
    assert len(rollbacks) >= 2, "the ladder first"


def test_weights_that_are_lost_already_are_not_gone_back_to():
    rooted = {"value": 300.0, "source": "a test"}
    tables = {"at": [{"step": 900, "source": "a test"}], "cured_below": [0.9, 0.9], "rooted_steps": rooted}
    chosen = small(stops=None, divergences=tables)
    (found,) = replay(chosen, None, [1])
    actions = [each["step_resumed"] for each in found.incidents]
    assert found.status == "COMPLETED"
    assert len(actions) > 1, "100 steps back were not enough"
    assert actions[-1] <= 600


def test_a_cluster_that_is_lost_comes_back_smaller_and_grows_again():
    lost = scenarios.load("cluster-loss").model_dump()["loss"]
    lost |= {"back_nodes": 6, "bad_nodes": 2}
    chosen = small("cluster-loss", loss=lost)
    fault_plan = sample(chosen, None, 1)
    played = play(chosen, fault_plan)
    sizes = {len(attempt.nodes) for attempt in played.state.attempts.values()}
    found = measure(chosen, fault_plan, played)
    assert (found.status, len(found.pages)) == ("COMPLETED", 1)
    assert sizes >= {6, 8}
    assert found.wall > lost["back_hours"]["value"] * 3600


def test_a_slightly_slow_node_is_moved_off():
    slow = {"per_day": {"value": 9.0, "source": "a test"}, "factor": {"value": 1.05, "source": "a test"}}
    chosen = small(stops=None, slow=slow)
    fault_plan = sample(chosen, None, 3)
    assert fault_plan.slow
    found = measure(chosen, fault_plan, play(chosen, fault_plan))
    assert "straggler" in {each["kind"] for each in found.incidents}


def test_the_oracle_pays_for_what_is_physical(record: Path):
    known = read_record(record, RULES)
    chosen = small()
    usual = Oracle(chosen, sample(chosen, known, 1)).seconds
    dear = chosen.model_copy(
        update={"physical": chosen.physical.model_copy(update={"load": scenarios.Sourced(value=500.0, source="dear")})}
    )
    stops = len(sample(chosen, known, 1).stops)
    assert Oracle(dear, sample(dear, known, 1)).seconds == pytest.approx(usual + stops * 485.0, rel=0.01)


IN_PLACE = scenarios.load("opt-175b").in_place


def test_without_its_table_a_scenario_has_restarts_alone():
    chosen = scenarios.load("opt-175b")
    assert chosen.by(None).in_place == chosen.by("in-place").in_place == IN_PLACE
    assert chosen.by("restart").in_place is None
    assert chosen.by("restart").save_every < chosen.save_every
    with pytest.raises(ScenarioError, match="no table"):
        small().by("in-place")


def test_both_kinds_of_recovery_meet_the_same_stops(record: Path):
    known = read_record(record, RULES)
    restart, in_place = (sample(small(in_place=each), known, 1).stops for each in (None, IN_PLACE))
    same = ("step", "kind", "label", "replacements", "launch_fails", "needs_human")
    assert [[getattr(s, n) for n in same] for s in restart] == [[getattr(s, n) for n in same] for s in in_place]
    assert all(stop.in_flight == 0.0 and stop.pair is None for stop in restart)
    assert len({stop.in_flight for stop in in_place}) == len(in_place)


def test_the_oracle_pays_for_a_replacement_and_for_the_part_of_the_step_that_is_lost(record: Path):
    assert IN_PLACE is not None
    known, chosen = read_record(record, RULES), small(in_place=IN_PLACE)
    fault_plan = sample(chosen, known, 1)
    plain = {"kind": "process", "pair": False, "replacements": (), "launch_fails": 2}
    fault_plan.stops = [replace(stop, **plain) for stop in fault_plan.stops]
    assert fault_plan.stops
    lost = Oracle(chosen, fault_plan).seconds - Oracle(chosen, replace(fault_plan, stops=[])).seconds
    each = IN_PLACE.notice.value + IN_PLACE.join.value + IN_PLACE.state.value
    step = chosen.training.step_seconds.value
    assert lost == pytest.approx(sum(each + stop.in_flight * step for stop in fault_plan.stops))
    pairs = replace(fault_plan, stops=[replace(stop, pair=True) for stop in fault_plan.stops])
    assert Oracle(chosen, pairs).seconds > Oracle(chosen, fault_plan).seconds + 60.0 * len(fault_plan.stops)


def test_lost_ranks_are_replaced_in_place_and_no_step_is_repeated():
    """The real supervisor on eight nodes: a rank, a GPU, a host and a hang, one after the other."""
    chosen = small(in_place=IN_PLACE, stops=None)
    later = ReplacementNode(name="n011", after=600.0), ReplacementNode(name="n012", after=600.0)
    kinds = {"process": (), "gpu": ((later[0],),), "host": ((later[1],),), "hang": ()}
    stops = [
        Stop(step=200 + 200 * number, kind=kind, label="", replacements=lost, in_flight=0.5, pair=False)
        for number, (kind, lost) in enumerate(kinds.items())
    ]
    fault_plan = replace(sample(chosen, None, 1), stops=stops, hosts_later=2)
    played = play(chosen, fault_plan)
    found = measure(chosen, fault_plan, played)
    assert (found.status, found.in_place, found.fell_back) == ("COMPLETED", 4, 0)
    (training,) = played.world.trainings.values()
    assert [point.step for point in training.points] == list(range(1, 1501))
    seen = {each["kind"]: each for each in found.incidents if each["generation"]}
    assert set(seen) == {"process_death", "bad_gpu", "silent_node", "hang"}
    assert all(each["proven"] for each in seen.values())
    assert seen["silent_node"]["seen_after"] < 10.0, "its peers tell"
    assert all(25.0 < seen[kind]["cost"] < 40.0 for kind in ("process_death", "bad_gpu", "silent_node"))
    assert 60.0 < seen["hang"]["cost"] < 75.0
    assert 99.0 < 100 * (found.share_of_oracle or 0.0) <= 100.0


def test_a_replacement_that_fails_ends_in_a_restart_after_the_deadline():
    chosen = small(in_place=IN_PLACE, stops=None)
    assert chosen.in_place is not None
    stop = Stop(step=400, kind="process", label="", in_flight=0.5, pair=False, replacement_fails=True)
    fault_plan = replace(sample(chosen, None, 1), stops=[stop])
    found = measure(chosen, fault_plan, play(chosen, fault_plan))
    (incident,) = (each for each in found.incidents if each["kind"] == "process_death")
    assert (found.status, found.in_place, found.fell_back) == ("COMPLETED", 0, 1)
    assert incident["action"] == "restart"
    assert incident["cost"] > chosen.in_place.deadline.value


def test_both_of_a_pair_are_lost_and_a_save_is_loaded():
    chosen = small(in_place=IN_PLACE, stops=None)
    lost = tuple((ReplacementNode(name=name, after=600.0),) for name in ("n011", "n012"))
    stop = Stop(step=400, kind="host", label="", replacements=lost, in_flight=0.5, pair=True)
    fault_plan = replace(sample(chosen, None, 1), stops=[stop], hosts_later=2)
    found = measure(chosen, fault_plan, play(chosen, fault_plan))
    assert (found.status, found.in_place) == ("COMPLETED", 0)
    assert max(each["steps_lost"] for each in found.incidents) > 0


@pytest.mark.parametrize("kind", ["gpu", "host"])
def test_two_nodes_that_fail_at_the_same_moment_are_replaced_together(kind: Literal["gpu", "host"]):
    training = scenarios.load("opt-175b").training.model_dump() | {"steps": 350, "evaluate_every": 0}
    chosen = small(in_place=IN_PLACE, stops=None, training=training)
    lost = tuple((ReplacementNode(name=name, after=60000.0),) for name in ("n011", "n012"))
    stop = Stop(step=200, kind=kind, label="", replacements=lost, in_flight=0.5, pair=False)
    fault_plan = replace(sample(chosen, None, 1), stops=[stop], hosts_later=2)
    found = measure(chosen, fault_plan, play(chosen, fault_plan))
    assert (found.status, found.in_place, found.fell_back) == ("COMPLETED", 1, 0)
    assert len(found.incidents) == 1 or {each["action"] for each in found.incidents} == {"replace_ranks", "exclude"}


def test_the_command_keeps_a_run_folder_and_says_what_was_drawn(tmp_path: Path, record: Path):
    text = (scenarios.SHIPPED / "quiet-week.toml").read_text().replace("steps = 28938", "steps = 300")
    (tmp_path / "week.toml").write_text(text)
    command = [sys.executable, "-m", "opt_ops", "replay", str(record), "--scenario", "week.toml"]
    kept = ["--keep", "runs/12", "--plot", "plot.svg"]
    done = run([*command, *kept], tmp_path)
    assert "goodput, %" in done.stdout
    assert "6 rows, 0 of them replayed" in done.stderr
    assert "Simulated" in (tmp_path / "plot.svg").read_text()
    entries, _ = read(tmp_path / "runs/12/journal")
    assert entries[-1].seq == len(entries)
    lines = (tmp_path / "runs/12/12.00/a0/telemetry.jsonl").read_text().splitlines()
    assert [json.loads(line)["num_updates"] for line in lines] == list(range(1, 301))
    out = subprocess.run(
        [*command, "-o", "json"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    (item,) = json.loads(out.stdout)["items"]
    assert item["simulated"] is True
    assert item["replays"][0]["status"] == "COMPLETED"
