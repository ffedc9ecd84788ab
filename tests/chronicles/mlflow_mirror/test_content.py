"""What MLflow should hold: a function of the journal and the telemetry."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from chronicles.mlflow_mirror import content
from chronicles.mlflow_mirror.columns import columns
from chronicles.mlflow_mirror.content import Choice
from chronicles.mlflow_mirror.parameters import parameters
from chronicles.record import load
from chronicles.report.build import build
from opt_ops.core.events import LineageCompleted, LineageHalted, RunPlanned
from opt_ops.core.values import Action, Outcome, Parent
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told, spiked

RECORD = load(LINEAGE)
REPORT = build(RECORD)
CONFIGS = {
    f"{path.parent.parent.name}-{path.parent.name}": json.loads(path.read_text())
    for path in sorted(LINEAGE.glob("*/*/config.json"))
}


def curve(folder: Path, total: int = 400, after: int = 0) -> list[content.Sample]:
    return [sample for _, samples in content.kept_samples(load(folder), total, after) for sample in samples]


def targets(folder: Path) -> list[content.MlflowRun]:
    record = load(folder)
    return content.mlflow_runs(record, build(record), {})


def test_a_lineage_is_a_parent_with_a_child_for_each_run():
    parent, first, second = content.mlflow_runs(RECORD, REPORT, CONFIGS)
    assert [t.name for t in (parent, first, second)] == ["1 · opt-tiny", "1.00 · start", "1.01 · × 0.75 after 1-i003"]
    assert [t.run for t in (parent, first, second)] == ["", "1.00", "1.01"]
    assert [t.status for t in (parent, first, second)] == ["FINISHED", "FINISHED", "FINISHED"]
    outcomes = [t.tags["opt.outcome"] for t in (parent, first, second)]
    assert outcomes == ["completed at 600", "left for 1.01", "completed at 600"]
    assert [t.tags["opt.state"] for t in (parent, first, second)] == ["COMPLETED", "left", "COMPLETED"]
    assert [t.tags["opt.last_incident"] for t in (parent, second)] == ["1-i003 loss spike, a drill", ""]
    assert [t.tags["opt.parent"] for t in (parent, first, second)] == ["", "", "1.00"]
    assert (parent.tags["opt.owner"], parent.tags["opt.drills"], second.tags["opt.drills"]) == ("ann", "4", "0")
    assert first.tags["opt.status"] == "left for 1.01"
    assert (second.tags["opt.from_step"], second.tags["opt.lr_scale"]) == ("150", "0.75")
    assert second.tags["opt.cause"].startswith("loss 6.562 at step 321")
    assert first.tags["opt.jobs"] == "1-n0"
    assert parent.start == round((RECORD.started or 0) * 1000)
    assert parent.end == round((RECORD.as_of or 0) * 1000)
    assert first.end is not None
    assert second.start < first.end < (second.end or 0), "the attempt was still ending when the next run was planned"


def test_parameters_are_what_was_asked_for_and_what_came_of_it():
    parent, _, second = content.mlflow_runs(RECORD, REPORT, CONFIGS)
    assert parent.params["recipe"] == "opt-tiny"
    assert parent.params["set"] == "steps=600"
    assert parent.params["optim.betas"] == "[0.9, 0.95]"
    assert parent.params["optim.peak_lr"] == "0.001"
    assert parent.params["optim.clip_norm"] == "1.0"
    assert (parent.params["lr_scale"], second.params["lr_scale"]) == ("1.0", "0.75")
    assert not {"host", "ts", "attempt", "resume"} & set(second.params), "these belong to an attempt"
    assert all(parent.params.values())


def test_no_parameter_is_there_twice():
    for run in content.mlflow_runs(RECORD, REPORT, CONFIGS):
        settings = [(key.rpartition(".")[2], value) for key, value in run.params.items()]
        assert len(settings) == len(set(settings)), sorted(settings)
        assert not [key for key in run.params if key.startswith(("settings.", "schedule.", "optimizer."))]


def test_parameters_say_what_came_of_the_settings_in_numbers_as_people_write_them():
    config = {
        "settings": {"optim": {"peak_lr": 1e-4, "clip_norm": 1.0}, "parallel": {"dp": 0}},
        "schedule": {"peak_lr": 0.00007499999999999998},
        "optimizer": {"clip_norm": 0.3, "betas": [0.9, 0.9500000000000001]},
        "layout": {"dp": 2, "nodes": 2},
        "lr_factors": [[100, 0.75], [150, 0.75]],
    }
    assert parameters(config, {"nodes": "2", "set": ""}) == {
        "nodes": "2",
        "optim.peak_lr": "7.5e-05",
        "optim.clip_norm": "0.3",
        "optim.betas": "[0.9, 0.95]",
        "layout.dp": "2",
        "lr_scale": "0.5625",
    }


def test_statuses(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    assert [target.status for target in targets(told.folder)] == ["RUNNING", "RUNNING"]
    assert [target.end for target in targets(told.folder)] == [None, None]
    told.end("12.00-a0", Outcome.FAILED, 50)
    told.see(LineageHalted(why="no rule fits", incident=None))
    assert [target.status for target in targets(told.folder)] == ["FAILED", "FAILED"]
    assert targets(told.folder)[0].tags["opt.cause"] == "no rule fits"


def test_a_run_that_somebody_asked_for_and_a_fork_have_names_that_say_so(tmp_path: Path):
    told = Told(tmp_path / "12").begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 120)
    point = told.save("12.00", 100)
    asked = told.incident("operator", "ann: the norm is high", "12.00-a0", 120)
    planned = {"run": "12.01", "parent": "12.00", "cause": "ann: the norm is high", "incident": asked}
    told.see(RunPlanned(**planned, checkpoint=point, lr_factors=(), settings=("optim.clip_norm=0.5",)))
    assert targets(told.folder)[2].name == "12.01 · clip 0.5, asked by ann"
    fork = Told(tmp_path / "13").begin(parent=Parent(lineage="12", run="12.01", step=60_000, checkpoint="/c"))
    (parent,) = targets(fork.folder)
    assert parent.name == "13 · opt-tiny · from 12.01 at 60,000"
    assert parent.tags["opt.parent"] == "12.01"


def test_what_others_wrote_has_no_control_characters(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    told.see(LineageHalted(why="\x1b[31mred\u202e\x9b and\x00", incident=None))
    record = load(told.folder)
    for run in content.mlflow_runs(record, build(record), {"12.00-a0": {"name": "\x1b]0;title\x07", "note": "a\nb"}}):
        for text in (*run.tags.values(), *run.params.values()):
            assert all(sign.isprintable() or sign == "\n" for sign in text), text


def test_lineages_of_one_number_are_told_apart(tmp_path: Path):
    keys = [content.lineage_key(Told(tmp_path / who / "12").begin(author=who).state) for who in ("ann", "ben")]
    assert keys[0] != keys[1]
    assert "'" not in content.lineage_key(Told(tmp_path / "x" / "12").begin(author="o'neil").state)


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=4),
    st.integers(1, 20),
)
def test_choices(step: int, windows: list[tuple[int, int]], every: int):
    choice = Choice(every=every, windows=tuple(windows))
    assert choice.takes(step) == (step % every == 0 or any(a <= step <= b for a, b in windows))


def test_all_points_around_an_incident_are_sent_of_a_long_lineage(told: Told):
    told.steps = 100_000
    report = build(load(spiked(told).folder))
    hit, after = content.choice(report, "12.00-a0"), content.choice(report, "12.01-a0")
    assert [step for step in range(1, 201) if hit.takes(step)] == [*range(10, 130, 10), *range(130, 201)]
    assert [step for step in range(101, 150) if after.takes(step)] == [*range(101, 131), 140]


def test_a_short_lineage_is_sent_whole():
    assert content.choice(REPORT, "1.00-a1").every == 1


def test_news_are_what_was_not_sent_before():
    lines = [{"ts": step, "num_updates": step, "loss": 1.0} for step in range(1, 41)]
    before, now = Choice(every=10, windows=()), Choice(every=10, windows=((17, 22),))

    def steps(sent: int, known: Choice | None) -> list[int]:
        return [sample.step for _, samples in content.unsent(lines, now, sent, known) for sample in samples]

    assert steps(0, None) == [10, 17, 18, 19, 20, 21, 22, 30, 40]
    assert steps(25, before) == [17, 18, 19, 21, 22, 30, 40]
    assert steps(40, now) == []


def test_what_is_not_finite_is_not_sent():
    line = {"ts": 1.5, "num_updates": 3, "loss": None, "gnorm": float("inf"), "lr": 0.1, "wps": "fast", "mfu": 0.4}
    found = {sample.key: (sample.value, sample.timestamp, sample.step) for sample in content.samples(line)}
    assert found == {"lr": (0.1, 1500, 3), "mfu": (0.4, 1500, 3)}


def test_lines_that_another_trainer_wrote_wrongly_are_left_out():
    assert content.step_of({"num_updates": 3, "ts": 1}) == 3
    assert content.step_of({"num_updates": "3", "ts": 1}) is None
    assert content.step_of({"num_updates": 3}) is None


def test_a_step_is_settled_once_a_later_checkpoint_is_good(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 130)
    assert curve(told.folder) == []
    told.save("12.00", 50)
    told.save("12.00", 100, healthy=False, why="the loss is out of its band")
    assert {sample.step for sample in curve(told.folder)} == set(range(1, 51))
    assert {sample.step for sample in curve(told.folder, after=48)} == {49, 50}


def test_everything_is_settled_at_the_end(told: Told):
    spiked(told).train("12.01-a0", 141, 400).end("12.01-a0", Outcome.COMPLETED, 400)
    told.see(LineageCompleted(step=400))
    samples = curve(told.folder)
    assert sorted({sample.step for sample in samples}) == list(range(1, 401))
    assert len(samples) == len({(sample.key, sample.step) for sample in samples}), "one value for each step"


def test_a_rollback_sends_the_settled_curve_back(told: Told):
    record = load(spiked(told).folder)
    assert content.resend_after(record, 150, 1) == 100, "150 was sent before 12.01 began at 100"
    assert content.resend_after(record, 150, 2) == 150, "12.01 was known then"
    assert content.resend_after(record, 0, 0) == 0


def test_a_long_settled_curve_has_about_as_many_points_as_mlflow_draws(told: Told):
    told.steps = 30_000
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 30_000)
    told.end("12.00-a0", Outcome.COMPLETED, 30_000).see(LineageCompleted(step=30_000))
    steps = {sample.step for sample in curve(told.folder, total=30_000)}
    assert len(steps) == content.KEPT_POINTS
    assert max(steps) == 30_000


def test_what_was_spent_adds_up():
    samples = content.ledger_samples(REPORT)
    lost = [sample.value for sample in samples if sample.key == "spent/steps_lost"]
    assert lost == [25, 39, 39, 211]
    assert [sample.value for sample in samples if sample.key == "spent/goodput"] == [REPORT.ledger.goodput]


def test_what_one_attempt_answers_was_spent_once(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 50)
    first, second = (told.incident("hang", f"no step {which}", "12.00-a0", 50) for which in "ab")
    told.decide(first, Action.RESTART).decide(second, Action.RESTART)
    told.end("12.00-a0", Outcome.FAILED, 50).launch("12.00-a1", None, first).train("12.00-a1", 1, 60)
    told.close(first)
    told.now += 5
    told.close(second)
    report = build(load(told.folder))
    rows = tuple(
        dataclasses.replace(row, next_attempt="12.00-a1", steps_discarded=50, seconds_down=seconds)
        for row, seconds in zip(report.incidents, (9.0, 12.0), strict=True)
    )
    samples = content.ledger_samples(dataclasses.replace(report, incidents=rows))
    assert [s.value for s in samples if s.key == "spent/steps_lost"] == [50, 50]
    assert [s.value for s in samples if s.key == "spent/seconds_down"] == [9.0, 12.0]


def test_the_note_fits_and_keeps_the_newest_incidents(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 5)
    for number in range(120):
        told.incident("hang", f"no step for {number} s, and {'a long story ' * 8}", "12.00-a0", 5)
    note = targets(told.folder)[0].tags["mlflow.note.content"]
    assert len(note) <= content.TAG_LIMIT
    assert "12-i119" in note
    assert "12-i000" not in note
    assert "chronicle/logbook.html" in note


def test_thousands_of_nodes_fit_into_a_tag(told: Told):
    nodes = [f"gpu-rack-{number:05d}" for number in range(2048)]
    told.begin().plan("12.00").hold(*nodes).launch("12.00-a0", None, None, *nodes)
    child = targets(told.folder)[1]
    assert child.tags["opt.nodes"].startswith("gpu-rack-00000 gpu-rack-00001 ")
    assert len(child.tags["opt.nodes"]) == content.TAG_LIMIT


def test_nothing_depends_on_the_clock():
    again = content.mlflow_runs(load(LINEAGE), build(load(LINEAGE)), CONFIGS)
    assert [dataclasses.asdict(t) for t in again] == [
        dataclasses.asdict(t) for t in content.mlflow_runs(RECORD, REPORT, CONFIGS)
    ]


def test_an_update_that_was_not_applied_is_named(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 30, loss=lambda step: None if step == 30 else 5.0)
    told.end("12.00-a0", Outcome.FAILED, 30)
    incident = told.incident("non_finite_loss", "not finite", "12.00-a0", 30, onset_step=30)
    told.decide(incident, Action.ROLLBACK, lr_factor=0.5)
    assert targets(told.folder)[1].tags["opt.not_finite"] == "12.00-a0 step 30"


def test_every_tag_and_metric_is_in_the_documentation():
    documented = (Path(__file__).parents[3] / "docs" / "formats.md").read_text().partition("\n### MLflow\n")[2]
    tags = {
        tag for target in content.mlflow_runs(RECORD, REPORT, CONFIGS) for tag in target.tags if tag.startswith("opt.")
    }
    keys = {*content.SERIES, *(sample.key for sample in [*content.ledger_samples(REPORT), *curve(LINEAGE, 600)])}
    keys |= {sample.key for each in columns(RECORD, REPORT).values() for sample in [*each.progress, *each.marks]}
    assert [name for name in sorted(tags | keys) if f"`{name}`" not in documented] == []
