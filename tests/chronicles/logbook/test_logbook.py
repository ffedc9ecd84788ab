"""The logbook: what an on-call person would have written, drawn from the journal alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chronicles.logbook.entries.build import entries
from chronicles.logbook.front_page import figures, front_page, seconds_left
from chronicles.logbook.render import render
from chronicles.record import load
from chronicles.report.build import build
from chronicles.wording import hours
from opt_ops.core import events as e
from opt_ops.core.values import Action, AllocationStatus, Checkpoint, Fault, Outcome, Tier, Verdict
from tests.chronicles.record import GOLDEN, LINEAGE
from tests.chronicles.told import Told, spiked


def titles(folder: Path) -> list[str]:
    record = load(folder)
    return [entry.heading for entry in entries(record, build(record))]


def drawn(folder: Path) -> tuple[str, str]:
    markdown, html, _ = render(folder)
    return markdown.read_text(), html.read_text()


def test_the_recorded_lineage_gives_the_golden_logbook(lineage: Path):
    assert drawn(lineage)[0] == (GOLDEN / "logbook.md").read_text()


def test_drawing_twice_and_elsewhere_gives_the_same_bytes(lineage: Path, tmp_path: Path):
    first = [path.read_bytes() for path in render(lineage)]
    assert [path.read_bytes() for path in render(lineage)] == first
    copy = Path(shutil.copytree(lineage, tmp_path / "elsewhere" / "1"))
    shutil.rmtree(copy / "chronicle")
    script = "import sys, pathlib; from chronicles.logbook.render import render; render(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(copy)], check=True, env={"PYTHONHASHSEED": "7"})
    assert [path.read_bytes() for path in sorted((copy / "chronicle").iterdir())] == [
        path.read_bytes() for path in sorted((lineage / "chronicle").iterdir())
    ]


def test_titles_follow_the_grammar():
    found = titles(LINEAGE)
    rolled_back = "rolled back 172 steps to step 150, learning rate × 0.75: loss spike at step 321"
    assert found == [
        "2026-11-22 14:18 UTC [opt-ops]: 1.01 completed",
        f"2026-11-22 14:17 UTC [opt-ops]: 1.01 {rolled_back}",
        "2026-11-22 14:16 UTC [opt-ops]: 1.00 daemon restarted, training continued",
        "2026-11-22 14:16 UTC [opt-ops]: 1.00 restarted without n2: xid_79",
        "2026-11-22 14:16 UTC [opt-ops]: 1.00 restarted: rank 1 on n2 was killed by signal 9 (SIGKILL)",
        "2026-11-22 14:16 UTC [ann]: 1.00 started",
    ]


def test_units_stay_with_their_numbers_in_titles_and_nothing_is_unprintable(told: Told):
    page = drawn(spiked(told).folder)[1]
    assert page.count("learning rate ×\N{NO-BREAK SPACE}0.5") >= 3, "both contents, and the entry"
    assert "\N{REPLACEMENT CHARACTER}" not in page


def test_drawing_needs_no_large_library(lineage: Path):
    script = "import sys, pathlib; from chronicles.logbook.render import render; render(pathlib.Path(sys.argv[1]));"
    script += "print([m for m in ('mlflow', 'torch', 'matplotlib', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script, str(lineage)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_rollback_tells_what_it_passed_over_and_what_changed(told: Told):
    markdown, _ = drawn(spiked(told).folder)
    assert "Newer checkpoints that were not chosen: 150 (too near the onset at 160)." in markdown
    assert "- learning-rate factors: none\n+ learning-rate factors: × 0.5 after 100\n" in markdown
    assert "100 steps discarded (101 to 200)" in markdown
    assert re.search(r"At step 101 the live optimizer used the learning rate (\S+); \1 was expected", markdown)


def test_a_proof_that_failed_is_said_loudly(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.end("12.00-a0", Outcome.FAILED, 50)
    incident = told.incident("process_death", "rank 1 on n2 was killed", "12.00-a0", 50)
    told.decide(incident, Action.RESTART).launch("12.00-a1", None, incident).train("12.00-a1", 1, 10)
    told.close(incident, proven=False, mismatch="step 1: learning rate 0.1, not 0.2")
    told.see(e.LineageHalted(why="12-i000: restart did not take effect", incident=incident))
    markdown, html = drawn(told.folder)
    assert "restarted: rank 1 on n2 was killed, NOT PROVEN" in markdown
    assert "NOT PROVEN. step 1: learning rate 0.1, not 0.2." in markdown
    assert "An operator is needed." in markdown
    assert titles(told.folder)[0].endswith("12.00 halted, an operator is needed")
    assert '<span class="status bad">HALTED</span>' in html


def test_a_daemon_that_takes_up_an_ended_lineage_is_no_restart(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    told.restart_daemon(7.0)
    told.see(e.LineageCompleted(step=60))
    told.restart_daemon(0.5)
    told.evaluated(60)
    assert len([title for title in titles(told.folder) if "daemon restarted" in title]) == 1


def test_suspensions_of_a_job_are_one_entry(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    allocation = told.state.allocation
    for seconds in (120.0, 300.0, 60.0):
        for status, after in ((AllocationStatus.SUSPENDED, 30.0), (AllocationStatus.RUNNING, seconds)):
            changed = e.AllocationChanged(allocation=allocation.name, status=status, nodes=allocation.nodes, reason="")
            told.see(changed, seconds=after)
    told.see(replace(changed, status=AllocationStatus.SUSPENDED))
    markdown, _ = drawn(told.folder)
    (title,) = [title for title in titles(told.folder) if "suspended" in title]
    assert title.endswith(f"the scheduler suspended job {allocation.job}")
    assert "4 times, 8 min 0 s in all; it is suspended now." in markdown.replace("\u00a0", " ")


def test_entries_of_one_moment_keep_the_order_of_the_journal(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    incident = told.incident("user_error", "no such recipe", "12.00-a0", 50)
    told.see(e.LineageHalted(why="no such recipe", incident=incident), seconds=0.0)
    found = [title.partition(": ")[2] for title in titles(told.folder)]
    assert found[:2] == ["12.00 halted, an operator is needed", "12.00 incident open: no such recipe"]


@pytest.mark.parametrize("stage", ["nothing", "asked", "planned", "held", "launched"])
def test_a_lineage_that_has_barely_begun(told: Told, stage: str):
    steps = {
        "nothing": [],
        "asked": [told.begin],
        "planned": [told.begin, lambda: told.plan("12.00")],
        "held": [told.begin, lambda: told.plan("12.00"), told.hold],
        "launched": [told.begin, lambda: told.plan("12.00"), told.hold, lambda: told.launch("12.00-a0")],
    }[stage]
    for step in steps:
        step()
    markdown, html = drawn(told.folder)
    assert "<svg" not in html
    assert ("Nothing has happened yet." in markdown) == (stage == "nothing")
    assert ("started" in markdown) == (stage != "nothing")


@pytest.mark.parametrize("goodput", [1e-9, 1e-300])
def test_an_end_that_no_calendar_has_is_not_estimated(told: Told, goodput: float):
    told.begin()
    told.plan("12.00")
    told.hold()
    told.launch("12.00-a0")
    report = build(load(told.folder))
    slow = replace(
        report, total_steps=100_000, ledger=replace(report.ledger, goodput=goodput, healthy_step_seconds=20.0)
    )
    assert seconds_left(slow) is None
    assert "Expected end" not in [figure.label for figure in figures(slow, None)]
    soon = replace(slow, ledger=replace(slow.ledger, goodput=0.9))
    assert "Expected end" in [figure.label for figure in figures(soon, None)]


def test_a_lineage_of_which_only_the_request_waits(tmp_path: Path):
    folder = tmp_path / "runs" / "3"
    (folder / "inbox").mkdir(parents=True)
    markdown, html = drawn(folder)
    assert markdown.startswith("# Lineage 3: logbook\n")
    assert "**NEW.** No daemon has read the request yet." in markdown
    assert "Lineage 3" in html


def test_in_the_middle_of_an_incident(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.end("12.00-a0", Outcome.FAILED, 50)
    incident = told.incident("process_death", "rank 1 on n2 was killed", "12.00-a0", 50, nodes=("n2",))
    markdown, html = drawn(told.folder)
    assert "incident open: rank 1 on n2 was killed" in markdown
    assert "1 incident: still open. 0 steps discarded." in markdown
    assert 'class="tag open">OPEN' in html
    told.decide(incident, Action.RESTART, exclude=("n2",))
    assert "12.00 restarting without n2: rank 1 on n2 was killed" in drawn(told.folder)[0]


def test_a_stop_has_an_author_and_a_reason(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.see(e.StopRequested(request="s", author="ben", reason="wrong data"))
    told.see(e.LineageCancelled(request="s", why="ben: wrong data"))
    markdown, _ = drawn(told.folder)
    assert "**CANCELLED.** Cancelled after 50 of 400 steps, as requested by ben: wrong data." in markdown
    assert "UTC [ben]: 12.00 stop requested\n\n> wrong data\n" in markdown


def test_what_else_a_person_would_have_noted(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 60)
    alert = {"signal": "gradient_norm", "tier": Tier.ALERT, "attempt": "12.00-a0", "rule": "rising", "at": told.now}
    told.see(e.SignalRaised(step=40, onset_step=39, evidence={"gnorm": 7.5}, **alert))
    point = Checkpoint(run="12.00", step=50, path="/c")
    told.see(e.CheckpointSeen(checkpoint=point), e.CheckpointRefused(checkpoint=point, why="a shard is short"))
    told.see(e.NoteAdded(request="n", author="cy", target="12.00-a0", text="looks fine"))
    drill = e.DrillRequested(
        request="d", author="cy", drill="d000", fault=Fault.XID, attempt="12.00-a0", arguments={"node": "n1", "xid": 79}
    )
    told.see(drill, e.DrillDone(drill="d000"))
    found = [title.partition(": ")[2] for title in titles(told.folder)]
    assert found[:4] == [
        "12.00 drill xid",
        "12.00 note on 12.00-a0",
        "12.00 refused the checkpoint of step 50: damaged",
        "12.00 alert, no action: gradient norm at step 40",
    ]
    assert "Gradient norm 7.5" in drawn(told.folder)[0]


def test_a_new_run_of_many_rollbacks_stays_on_the_page(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 40)
    parent, attempt = "12.00", "12.00-a0"
    for number in range(1, 10):
        incident = told.incident("loss_spike", "loss 9", attempt, 40, onset_step=30)
        told.decide(incident, Action.ROLLBACK, lr_factor=0.9).end(attempt, Outcome.STOPPED, 40)
        run = f"12.{number:02d}"
        told.plan(run, parent, None, [(0, 0.9**number)], incident, cause="loss 9")
        parent, attempt = run, f"{run}-a0"
        told.launch(attempt, None, incident).train(attempt, 1, 40).close(incident)
    markdown, html = drawn(told.folder)
    assert markdown.count("rolled back 40 steps to the start, learning rate × 0.9: loss spike at step 40") == 2 * 9
    assert html.count('class="tree') == 10
    assert json.loads((told.folder / "chronicle" / "report.json").read_text())["goodput"]["kept_steps"] == 40


def crowded(told: Told) -> Told:
    """Thirty spares that fail one after another, each replaced, and one node that stops training with a spike after."""
    names = [f"node{number:03d}" for number in range(40)]
    told.begin().plan("12.00").hold(*names).launch("12.00-a0", None, None, *names[:2]).train("12.00-a0", 1, 50)
    for number, name in enumerate(names[2:33]):
        lost = told.incident("bad_gpu", f"{name}: gpu_lost", None, None, nodes=(name,))
        told.decide(lost, Action.EXCLUDE, exclude=(name,)).see(e.NodeExcluded(node=name, incident=lost, reason="x"))
        judged = e.NodeJudged(
            node=name, host=name, verdict=Verdict.BAD, reason="gpu_lost", source="NVML", at=told.now, evidence={}
        )
        told.see(judged)
        told.see(
            e.IncidentClosed(incident=lost, proven=True, proof={}, step_resumed=None, steps_lost=0, seconds_down=0.0)
        )
        asked = f"12-m{number}"
        told.see(e.AllocationIntended(allocation=asked, nodes=1, exclude=tuple(names), why="39 of 40 are held"))
        told.see(e.AllocationSubmitted(allocation=asked, job=str(900 + number), adopted=False))
        told.now += 600
    told.now += 3600
    for number in range(3):
        asked = f"12-o{number}"
        told.see(e.AllocationIntended(allocation=asked, nodes=2, exclude=(), why="more are wanted"), seconds=60)
        told.see(e.AllocationSubmitted(allocation=asked, job=str(990 + number), adopted=False))
    silent = told.incident("silent_node", "node001 silent for 27 s", "12.00-a0", 50, nodes=("node001",))
    told.decide(silent, Action.RESTART, exclude=("node001",))
    told.see(e.NodeExcluded(node="node001", incident=silent, reason="silent"))
    spike = told.incident("loss_spike", "loss 9.1 at step 50", "12.00-a0", 50, onset_step=40)
    told.decide(spike, Action.RESTART)
    told.end("12.00-a0", Outcome.FAILED, 50).launch("12.00-a1", None, spike, "node000", "node034")
    return told.train("12.00-a1", 1, 60).close(silent).close(spike)


def test_of_many_incidents_the_front_page_lists_those_that_touched_training(told: Told):
    report = build(load(crowded(told).folder))
    first = front_page(report, None)
    assert [row.incident for row in first.incidents] == ["12-i031", "12-i032"]
    assert first.harmless.startswith("31 more incidents discarded no steps. Each excluded a node on which no rank ran.")
    assert "33 incidents, 2 of which interrupted training: all proven." in first.lead
    assert sum(row.steps_discarded or 0 for row in report.incidents) == 100
    assert first.totals.steps_discarded == 50, "both were answered by one attempt, which lost them once"


def test_nodes_that_were_taken_out_for_the_same_are_one_row(told: Told):
    first = front_page(build(load(crowded(told).folder)), None)
    (row,) = [row for row in first.nodes if row.reason == "gpu_lost"]
    assert (row.node, row.excluded_by) == ("31 nodes", "31 incidents")
    assert len(first.allocations) == 16
    assert first.allocations_before == "19 earlier allocations not listed."


def test_what_is_asked_for_in_the_place_of_a_node_stands_with_its_incident(told: Told):
    record = load(crowded(told).folder)
    log = entries(record, build(record))
    titles = [entry.title for entry in log]
    assert [title for title in titles if "requested" in title] == ["requested 6 nodes in 3 jobs"]
    (together,) = [entry for entry in log if entry.title == "requested 6 nodes in 3 jobs"]
    assert together.facts[0].text == "6 nodes requested, as jobs 990, 991, 992. More are wanted."
    (first,) = [entry for entry in log if entry.anchor == "12-i000"]
    assert [fact.text for fact in first.facts if fact.label == "Nodes"] == [
        "1 node requested, as job 900. 39 of 40 are held."
    ], "without the names of all nodes that are held or excluded"
    assert "restarted without node001: silent for 27 s" in titles


def test_hours_are_numbers_that_people_read():
    shown = [hours(number) for number in (None, 0.0, 0.0123, 6.254, 87.54, 999.6, 122_789.0)]
    assert shown == ["–", "0", "0.0123", "6.25", "87.5", "1,000", "123,000"]


def test_an_alert_that_came_again_says_so(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 120)
    alert = {"signal": "loss_spike", "tier": Tier.ALERT, "rule": "r", "evidence": {}, "onset_step": 110}
    told.see(e.SignalRaised(attempt="12.00-a0", step=112, at=told.now, **alert))
    lost = told.incident("process_death", "rank 1 left", "12.00-a0", 120)
    told.decide(lost, Action.RESTART).end("12.00-a0", Outcome.FAILED, 120)
    told.launch("12.00-a1", None, lost).train("12.00-a1", 1, 115).close(lost)
    told.see(e.SignalRaised(attempt="12.00-a1", step=80, at=told.now, **alert))
    told.incident("loss_spike", "loss 9.1", "12.00-a1", 115, onset_step=110)
    record = load(told.folder)
    (entry,) = [entry for entry in entries(record, build(record)) if "alert" in entry.title]
    assert "This one recurred in attempt 12.00-a1 and became 12-i001." in entry.facts[1].text
