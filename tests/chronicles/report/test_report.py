"""report.json: a contract for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chronicles.record import load
from chronicles.report.build import build
from chronicles.report.encode import SCHEMA, lineage
from opt_ops.core.values import Action, Outcome
from tests.chronicles.record import GOLDEN, LINEAGE
from tests.chronicles.told import Told, spiked


def report_of(folder: Path) -> dict[str, Any]:
    return lineage(build(load(folder)))


def test_the_recorded_lineage_gives_the_golden_report():
    golden = json.loads((GOLDEN / "report.json").read_text())
    del golden["story"]  # it is made of the logbook's entries
    assert report_of(LINEAGE) == golden


def test_a_rollback_is_proven_by_numbers():
    rows = {row["kind"]: row for row in report_of(LINEAGE)["incidents"]}
    row = rows["loss_spike"]
    assert row["lr_after"] == pytest.approx(row["lr_before"] * row["lr_factor"], rel=1e-12)
    assert (row["step_failed"], row["last_step"], row["step_resumed"], row["steps_lost"]) == (321, 322, 150, 172)
    assert (row["run_before"], row["run_after"], row["checkpoint_step"]) == ("1.00", "1.01", 150)
    assert (row["drill"], row["fault"], row["rung"], row["proven"]) == ("d003", "lr", 1, True)


def test_seconds_of_an_incident_follow_each_other():
    row = report_of(LINEAGE)["incidents"][0]
    parts = [row[f"seconds_to_{what}"] for what in ("see", "decide", "relaunch", "first_step")]
    assert parts == pytest.approx([0.65, 0.001, 0.0, 3.924], abs=0.001)
    from_exit_to_first_step = sum(parts)
    assert row["seconds_down"] == pytest.approx(from_exit_to_first_step, abs=0.1), "the rank died right after a step"


def test_the_step_at_the_first_evidence_comes_from_telemetry():
    row = report_of(LINEAGE)["incidents"][1]
    assert row["kind"] == "bad_gpu"
    assert row["step_failed"] == 111, "the journal knew of step 59 when the kernel logged the Xid"


def test_runs_tell_what_became_of_their_steps(told: Told):
    first, second = report_of(spiked(told).folder)["runs"]
    assert (first["steps"], first["steps_kept"], first["last_step"], first["lr_scale"]) == (200, 100, 200, 1.0)
    assert (second["steps"], second["steps_kept"], second["from_step"], second["lr_scale"]) == (40, 40, 100, 0.5)
    assert second["parent"] == "12.00"
    assert second["lr_factors"] == [[100, 0.5]]


def test_a_lineage_that_nobody_has_started_yet(tmp_path: Path):
    report = report_of(tmp_path)
    assert (report["schema"], report["status"], report["started"], report["as_of"]) == (SCHEMA, "NEW", None, None)
    assert (report["step"], report["total_steps"], report["incidents"], report["runs"]) == (0, None, [], [])
    assert report["goodput"]["goodput"] is None
    json.dumps(report, allow_nan=False)


def test_in_the_middle_of_an_incident(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.end("12.00-a0", Outcome.FAILED, 50)
    incident = told.incident("process_death", "rank 1 on n2 was killed", "12.00-a0", 50, nodes=("n2",))
    (row,) = report_of(told.folder)["incidents"]
    assert (row["action"], row["closed"], row["proven"], row["seconds_down"], row["run_after"]) == (None,) * 5
    told.decide(incident, Action.RESTART)
    told.launch("12.00-a1", None, incident)
    report = report_of(told.folder)
    (row,) = report["incidents"]
    assert (row["action"], row["next_attempt"], row["seconds_to_first_step"]) == ("restart", "12.00-a1", None)
    assert report["goodput"]["kept_steps"] == 0, "the new attempt begins from scratch"
    assert report["ended"] is None
    assert report["as_of"] is not None


def test_a_living_lineage_is_as_old_as_its_newest_sign(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 9)
    before = report_of(told.folder)["as_of"]
    told.train("12.00-a0", 10, 30, journal=False)
    after = report_of(told.folder)
    assert after["as_of"] > before
    assert after["step"] == 30


def test_every_field_is_in_the_documentation():
    documented = (Path(__file__).parents[3] / "docs" / "formats.md").read_text().partition("\n## Chronicle\n")[2]
    report = report_of(LINEAGE)
    fields = {*report, *report["goodput"], *report["journal"], *report["goodput"]["seconds_by_phase"]}
    for rows in ("incidents", "runs", "attempts", "nodes", "drills", "checkpoints"):
        fields |= {field for row in report[rows] for field in row}
    assert [field for field in sorted(fields - {"schema"}) if f"`{field}`" not in documented] == []
