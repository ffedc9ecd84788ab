"""Thinning keeps every peak; what happened is all there."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from chronicles.logbook.drawing import figure
from chronicles.logbook.drawing.curves import curve, marks, thin, thinned
from chronicles.record import load
from chronicles.report.build import build
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told, falling, spiked


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], limit: int):
    chosen = thin(range(len(values)), values, limit)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= max(limit, 1)
    assert chosen[0] == 0
    assert chosen[-1] == len(values) - 1
    assert max(values) in [values[index] for index in chosen]
    assert min(values) in [values[index] for index in chosen]


def test_every_bucket_keeps_its_own_peak():
    values = [math.sin(step) for step in range(10_000)]
    values[1234], values[7777] = 50.0, -50.0
    chosen = thin(range(10_000), values, 100)
    assert {1234, 7777} <= set(chosen)
    assert len(chosen) <= 100
    assert max(b - a for a, b in pairwise(chosen)) <= 2 * 10_000 // 49, "no bucket is left empty"


def test_lines_of_a_rollback(told: Told):
    record = load(spiked(told).folder)
    drawn = curve(record, "loss")
    kept = [line for line in drawn.lines if line.kept]
    lost = [line for line in drawn.lines if not line.kept]
    assert [(line.run, line.steps[0], line.steps[-1]) for line in kept] == [(0, 1, 100), (1, 100, 140)]
    assert [(line.run, line.steps[0], line.steps[-1]) for line in lost] == [(0, 100, 200)], "it hangs on what counts"
    assert drawn.gaps == []


def test_a_loss_that_is_not_finite_is_a_gap(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 30, loss=lambda step: None if step == 30 else falling(step))
    record = load(told.folder)
    drawn = curve(record, "loss")
    assert drawn.gaps == [30]
    assert [line.steps[-1] for line in drawn.lines] == [29]
    assert "var(--bad)" in figure.draw(record, build(record))[0]


def test_a_long_curve_is_drawn_in_few_points(told: Told):
    told.steps = 30_000
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 30_000, loss=lambda step: 90.0 if step == 12_345 else falling(step))
    record = load(told.folder)
    drawn = thinned(curve(record, "loss"), 2000)
    assert sum(len(line.steps) for line in drawn.lines) <= 2000
    assert max(max(line.values) for line in drawn.lines) == 90.0
    assert sum(map(len, figure.draw(record, build(record)))) < 300_000


def test_marks_are_where_training_stopped(told: Told):
    record = load(spiked(told).folder)
    (mark,) = marks(build(record))
    assert (mark.incident, mark.step, mark.resumed, mark.quiet) == ("12-i000", 200, 100, False)


def test_drawings_have_no_date_no_foreign_color_and_no_shared_ids(told: Told):
    record = load(spiked(told).folder)
    drawings = figure.draw(record, build(record))
    assert drawings == figure.draw(record, build(record))
    ids = [part.split('"')[0] for svg in drawings for part in svg.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert "var(--run-1)" in drawings[0]
    assert "#0101" not in "".join(drawings)
    assert "<metadata" not in "".join(drawings)


def test_what_lies_beyond_a_panel_is_told_in_full():
    record = load(LINEAGE)
    part = record.curves[2]
    points = [replace(p, lr=0.0421234) if p.step == 280 else p for p in part.points]
    record = replace(record, curves=[*record.curves[:2], replace(part, points=points), record.curves[3]])
    assert all(">4.21234e-2<" in svg for svg in figure.draw(record, build(record)))
