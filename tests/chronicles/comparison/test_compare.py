"""Two lineages side by side: where they part, what is inherited, and the numbers of the verdict."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chronicles.comparison.build import MOST_POINTS, Comparison, compare
from chronicles.comparison.family import Family, Member, common_ancestor, family, settled
from chronicles.comparison.page import page
from chronicles.comparison.words import head, score_rows, verdict
from chronicles.kept_curve import CurveOf
from chronicles.record import LineageRecord
from chronicles.report.encode import encode
from opt_ops.core.state.model import State
from opt_ops.core.values import Parent
from opt_ops.runfolder.telemetry_curve import CurvePoint
from tests.chronicles.told import Told, falling, spiked


def parent(told: Told, run: str, step: int) -> Parent:
    return Parent(lineage=told.lineage, run=run, step=step, checkpoint=f"/ckpt/{told.lineage}/{run}/{step}")


def forked(told: Told, number: str, run: str, step: int, last: int, better: float = 0.05, tokens: int = 1024) -> Told:
    """A fork of a lineage that trains to `last`, with so much less loss than `falling`."""
    other = Told(told.folder.with_name(number))
    other.tokens = lambda at: told.tokens(step) + (at - step) * tokens
    of = parent(told, run, step)
    other.begin(parent=of).plan(f"{number}.00", run, of.saved).hold().launch(f"{number}.00-a0", of.saved)
    return other.train(f"{number}.00-a0", step + 1, last, loss=lambda at: falling(at) - better)


@pytest.fixture
def plain(tmp_path: Path) -> Told:
    told = Told(tmp_path / "12")
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    told.save("12.00", 100)
    return told


def compared(*folders: Path, to: int | None = None) -> Comparison:
    return compare(family(folders[0]), family(folders[1]), to=to)


def test_a_fork_has_its_parents_steps_before_it_and_is_judged_by_those_behind(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 300)
    found = compared(plain.folder, fork.folder)
    assert found.common is not None
    assert (found.common.run, found.common.step, found.common.checkpoint) == ("12.00", 100, "/ckpt/12/12.00/100")
    assert [curve.inherited for curve in found.curves] == [0, 100]
    assert [len(curve.step) for curve in found.curves] == [200, 300]
    assert (found.axis, len(found.at), found.at[0].step, found.at[-1].step) == ("step", 10, 110, 200)
    assert found.verdict.steps == 50
    assert found.verdict.difference == pytest.approx(-0.05)
    assert found.verdict.better == "13"
    assert head(found) == "Lineage 13 goes on from step 100 of 12.00."
    said = "Lineage 13 is better: its mean loss is 0.0500 below that of 12 in the last 50 common steps, up to step 200"
    assert verdict(found).startswith(said)
    assert found.cost[1].wall_seconds < found.cost[0].wall_seconds + 200


def test_steps_up_to_the_one_that_is_given(plain: Told):
    found = compared(plain.folder, forked(plain, "13", "12.00", 100, 300).folder, to=120)
    assert [curve.step[-1] for curve in found.curves] == [120, 120]
    assert (found.verdict.step, found.verdict.steps) == (120, 20)
    before = compared(plain.folder, plain.folder.with_name("13"), to=90)
    assert (before.at, before.verdict.step, before.verdict.better) == ([], None, None)
    assert "no step behind step 100 that both have made" in verdict(before)


def test_a_fork_of_what_its_parent_has_discarded_since_parts_where_the_parent_went_back(tmp_path: Path):
    told = spiked(Told(tmp_path / "12"))  # back from 200 to 100 in 12.01
    fork = forked(told, "13", "12.00", 150, 180)
    ancestor = common_ancestor(family(told.folder), family(fork.folder))
    assert ancestor is not None
    assert (ancestor.run, ancestor.step, ancestor.checkpoint) == ("12.00", 100, "/ckpt/12/12.00/100")
    points, inherited = settled(family(fork.folder))
    assert inherited == 150
    assert [point.step for point in points] == list(range(1, 181))
    assert all(point.loss == pytest.approx(falling(point.step)) for point in points[:150])


def test_a_fork_of_a_fork(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 300)
    young = forked(fork, "14", "13.00", 250, 320)
    sibling = forked(plain, "15", "12.00", 150, 320)
    points, inherited = settled(family(young.folder))
    assert (len(points), inherited) == (320, 250)
    for other, run, step in ((plain, "12.00", 100), (fork, "13.00", 250), (sibling, "12.00", 100)):
        ancestor = common_ancestor(family(other.folder), family(young.folder))
        assert ancestor is not None
        assert (ancestor.run, ancestor.step) == (run, step)
    assert "Lineages 14 and 15 part at step 100 of 12.00." in head(compared(young.folder, sibling.folder))


def test_folders_that_name_each_other_as_parent_end(tmp_path: Path):
    for name, other in (("13", "14"), ("14", "13")):
        parent = Parent(lineage=other, run=f"{other}.00", step=20, checkpoint="c")
        Told(tmp_path / name).begin(parent=parent).plan(f"{name}.00").hold().launch(f"{name}.00-a0")
    assert [record.lineage for record in family(tmp_path / "13").records] == ["13", "14"]
    assert not compare(family(tmp_path / "13"), family(tmp_path / "14")).curves[0].step


def test_lineages_that_have_nothing_in_common(plain: Told, tmp_path: Path):
    other = Told(tmp_path / "13")
    other.begin().plan("13.00").hold().launch("13.00-a0").train("13.00-a0", 1, 60, loss=falling)
    found = compared(plain.folder, other.folder)
    assert (found.common, found.at[-1].step, found.verdict.better) == (None, 60, None)
    assert verdict(found) == "The losses are the same in the last 50 common steps, up to step 60."


def test_other_batch_sizes_are_compared_after_as_many_tokens(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 140, tokens=2048)
    found = compared(plain.folder, fork.folder)
    assert found.axis == "tokens"
    assert (found.at[-1].step, found.at[-1].tokens) == (180, 180 * 1024)
    assert found.at[-1].loss == (pytest.approx(falling(180)), pytest.approx(falling(140) - 0.05))
    assert "after as many tokens" in page(found)


def test_the_answer_has_every_field(plain: Told):
    item = json.loads(json.dumps(encode(compared(plain.folder, forked(plain, "13", "12.00", 100, 300).folder))))
    assert item["lineages"] == ["12", "13"]
    assert item["common"].keys() == {"run", "step", "checkpoint"}
    for curve in item["curves"]:
        arrays = ("step", "loss", "gnorm", "lr", "wps", "tokens")
        assert curve.keys() == {"lineage", *arrays, "inherited"}
        assert len({len(curve[each]) for each in arrays}) == 1
    assert item["verdict"].keys() >= {"step", "loss", "difference", "noise", "better"}
    assert item["incidents"][0].keys() == {"lineage", "total", "drills", "by_kind"}
    costs = "wall_seconds goodput node_hours steps_taken_back calls person_seconds kwh tco2e cost"
    assert item["cost"][0].keys() == {"lineage", *costs.split()}
    assert "points" not in item


# ---- numbers


def made(name: str, losses: list[float], tokens: int = 512) -> Family:
    points = [CurvePoint(step, loss, 1.0, 1e-3, 1.0, step * tokens, True) for step, loss in enumerate(losses, 1)]
    curve = CurveOf(attempt=f"{name}.00-a0", run=f"{name}.00", start=0, points=points, discarded=())
    record = LineageRecord(lineage=name, entries=[], remarks=[], state=State(), statuses=[], curves=[], jobs={})
    return Family(folder=Path("/nowhere") / name, members=[Member(record=record, curves=[curve])])


LOSSES = st.lists(st.floats(0.5, 12.0), min_size=1, max_size=120)


@given(a=LOSSES, b=LOSSES)
def test_the_verdict_is_that_of_its_definition_and_the_same_from_both_sides(a: list[float], b: list[float]):
    found, turned = compare(made("1", a), made("2", b)), compare(made("2", b), made("1", a))
    size = min(len(a), len(b))
    pairs = (
        list(zip(a, b, strict=False))[-50:] if len(a) == len(b) else list(zip(a[:size], b[:size], strict=True))[-50:]
    )
    differences = [y - x for x, y in pairs]
    mean = sum(differences) / len(differences)
    assert found.verdict.difference == pytest.approx(mean, abs=1e-9)
    assert found.verdict.step == size
    if len(pairs) > 1:
        variance = sum((each - mean) ** 2 for each in differences) / (len(pairs) - 1)
        noise = math.sqrt(variance / len(pairs))
        assert found.verdict.noise == pytest.approx(noise, abs=1e-9)
        if abs(abs(mean) - 2 * noise) > 1e-9:
            assert found.verdict.better == (None if abs(mean) < 2 * noise else "12"[mean < 0])
    else:
        assert (found.verdict.noise, found.verdict.better) == (None, None)
    assert turned.verdict.difference == pytest.approx(-found.verdict.difference)
    assert turned.verdict.better == found.verdict.better
    assert len(found.at) <= 10
    assert found.at[-1].step == size


@given(seed=st.integers(0, 2**32), batch=st.sampled_from([256, 384, 1024, 1500]), slope=st.floats(-1e-5, 1e-5))
def test_a_loss_that_follows_the_tokens_is_the_same_whatever_the_batch(seed: int, batch: int, slope: float):
    draw = random.Random(seed)
    a = [5.0 + slope * 512 * step for step in range(1, draw.randint(5, 300))]
    b = [5.0 + slope * batch * step for step in range(1, draw.randint(5, 300))]
    found = compare(made("1", a), made("2", b, tokens=batch))
    assert found.axis == "tokens"
    assert all(abs(each.difference) < 1e-9 for each in found.at)
    assert all(each.tokens == each.step * 512 for each in found.at)
    if found.at:
        last = min(len(a) * 512, len(b) * batch) // 512
        assert found.at[-1].step == last


def test_long_curves_are_thinned_and_keep_their_ends_and_peaks():
    losses = [3.0] * 5000
    losses[1234] = 9.0
    found = compare(made("1", losses), made("2", losses))
    for curve in found.curves:
        assert len(curve.step) <= MOST_POINTS
        assert (curve.step[0], curve.step[-1], max(curve.loss)) == (1, 5000, 9.0)
    assert found.verdict.better is None


# ---- scores


def test_scores_that_both_have_are_compared_at_the_nearest_step_behind_the_common_ancestor(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 300)
    for told in (plain, fork):
        told.evaluated(100, value=0.1)
        told.evaluated(150, metric="f1", stderr=None)
        told.evaluated(150, metric="brier", value=0.2 + 0.3 * (told is fork))
    plain.evaluated(150, value=0.50).evaluated(200, value=0.52)
    fork.evaluated(190, value=0.60).evaluated(300, value=0.61)
    plain.evaluated(200, task="piqa").evaluated(200, shots=5).evaluated(200, task_version="1.0 first 200")
    fork.evaluated(200, task="copa").evaluated(200, shots=3).evaluated(200, task_version="1.0 first 100")
    found = compared(plain.folder, fork.folder)
    by_metric = {each.metric: each for each in found.scores}
    assert len(found.scores) == len(by_metric) == 3, "what only one has is not compared"
    score = by_metric["acc_norm"]
    assert (score.step, score.value, score.better) == ((200, 190), (0.52, 0.60), "13")
    assert (score.errors, score.certain) == (pytest.approx(0.08 / math.hypot(0.01, 0.01)), True)
    assert (by_metric["f1"].certain, by_metric["f1"].errors) == (False, None)
    assert (by_metric["brier"].certain, by_metric["brier"].better) == (True, None), "nobody knows which is better"
    assert [each.step for each in compared(plain.folder, fork.folder, to=180).scores] == [(150, 150)] * 2
    written = encode(found)["scores"][-1]
    assert list(written)[:3] == ["task", "metric", "shots"]
    assert "pair" not in written


def test_a_forks_scores_are_also_those_of_its_parent_before_it(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 300)
    young = forked(fork, "14", "13.00", 250, 320)
    plain.evaluated(150, value=0.5)
    fork.evaluated(150, value=0.501).evaluated(300, value=0.9)
    (score,) = compared(plain.folder, young.folder).scores
    assert (score.run, score.step, score.certain) == (("12.00", "13.00"), (150, 150), False)


def test_with_other_batch_sizes_the_nearest_scores_are_those_after_as_many_tokens(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 150, tokens=2048)
    plain.evaluated(140, value=0.5).evaluated(180, value=0.5)
    fork.evaluated(140, value=0.5)
    (score,) = compared(plain.folder, fork.folder).scores
    assert score.step == (180, 140)
    assert "180 and 140" in page(compared(plain.folder, fork.folder))


def test_words_about_scores_are_escaped_on_the_page(plain: Told):
    fork = forked(plain, "13", "12.00", 100, 300)
    for told, value in ((plain, 0.5), (fork, 0.6)):
        told.evaluated(200, task="<b>x", value=value)
    found = compared(plain.folder, fork.folder)
    (row,) = score_rows(found)
    assert (row.difference, row.judged) == ("+0.100", "13 is better (7.1 SE)")
    shown = page(found)
    assert "&lt;b&gt;x acc_norm" in shown
    assert "<b>x" not in shown
