"""Thinning keeps every peak; what happened is all there."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from chronicles.logbook.drawing import curve_data, figure
from chronicles.logbook.drawing.curves import curve, thin, thinned
from chronicles.logbook.drawing.marks import marks
from chronicles.logbook.drawing.scale import Scale
from chronicles.logbook.entries.build import entries
from chronicles.logbook.story.build import story
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from tests.chronicles.record import LINEAGE
from tests.chronicles.told import Told, falling, spiked


def drawn_of(record: LineageRecord) -> list[str]:
    report = build(record)
    return figure.draw(figure.measured(record, report), marks(report))


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
    assert [(line.run, line.steps[0], line.steps[-1]) for line in lost] == [(0, 100, 200)], (
        "from the last kept point on"
    )
    assert drawn.gaps == []


def test_a_loss_that_is_not_finite_is_a_gap(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 30, loss=lambda step: None if step == 30 else falling(step))
    record = load(told.folder)
    drawn = curve(record, "loss")
    assert drawn.gaps == [30]
    assert [line.steps[-1] for line in drawn.lines] == [29]
    assert '<path class="gap"' in drawn_of(record)[0]


def test_a_long_curve_is_drawn_in_few_points(told: Told):
    told.steps = 15_000
    told.begin().plan("12.00").hold().launch("12.00-a0")
    told.train("12.00-a0", 1, 15_000, loss=lambda step: 90.0 if step == 12_345 else falling(step))
    record = load(told.folder)
    drawn = thinned(curve(record, "loss"), 2000)
    assert sum(len(line.steps) for line in drawn.lines) <= 2000
    assert max(max(line.values) for line in drawn.lines) == 90.0
    assert sum(map(len, drawn_of(record))) < 300_000
    told.incident("hang", "x", "12.00-a0", 15_000)
    record = load(told.folder)
    report = build(record)
    data = json.loads(curve_data.encode(record, report, figure.measured(record, report), marks(report)))
    ((run, kept, differences, values),) = data["lines"]["loss"]
    steps = list(accumulate(differences))
    assert (run, kept, len(steps) <= 2 * curve_data.BUCKETS + 601) == (0, 1, True)
    assert values[steps.index(12_345)] == 90.0, "a peak is kept"
    assert set(range(14_700, 15_001)) <= set(steps), "near a named incident there is every step"
    assert (data["first"], data["last"], data["marks"]) == (1, 15_000, [["12-i000", 15_000, None, 0]])
    ((_, nodes, differences, times),) = data["attempts"]
    assert (nodes, sum(differences), len(times)) == (2, 15_000, len(differences))


def test_marks_are_where_training_stopped(told: Told):
    record = load(spiked(told).folder)
    (mark,) = marks(build(record))
    assert (mark.incident, mark.step, mark.resumed, mark.quiet) == ("12-i000", 200, 100, False)


def test_of_many_incidents_the_dearest_one_of_each_large_entry_is_named(told: Told):
    told.steps = 3000
    told.begin().plan("12.00").hold().launch("12.00-a0")
    for step in range(1, 30 * 45, 30):
        told.train("12.00-a0", step, step + 29)
        told.incident("hang", "x", "12.00-a0", step + 29)
    record = load(told.folder)
    report = build(record)
    shown = story(record, report, entries(record, report))
    large = tuple(replace(entry, large=entry.members[0] in ("12-i003", "12-i007")) for entry in shown.entries)
    placed = marks(report, replace(shown, entries=large))
    assert len(placed) == 45
    assert all(mark.incident not in ("12-i000", "12-i044") or not mark.named for mark in placed)
    svg = figure.draw(figure.measured(record, report), placed)[0]
    assert svg.count('class="tick"') == sum(not mark.named for mark in placed) > 40
    assert svg.count('class="hit"') == svg.count('class="tick"')
    assert "12-i000: Hang after step 30" in svg


def test_drawings_have_no_ids_no_colors_and_no_styles_of_their_own(told: Told):
    record = load(spiked(told).folder)
    drawings = drawn_of(record)
    assert drawings == drawn_of(record)
    for svg in drawings:
        root = ET.fromstring(svg)
        names = {name for element in root.iter() for name in element.attrib}
        assert names.isdisjoint({"id", "style", "fill", "stroke", "color"})
        classes = [element.attrib.get("class", "") for element in root.iter("path")]
        assert {"line run-0", "line run-0 gone", "line run-1"} <= set(classes)


def test_a_drawing_shows_everything_once(told: Told):
    record = load(spiked(told).folder)
    for svg, size in zip(drawn_of(record), figure.SIZES, strict=True):
        root = ET.fromstring(svg)
        texts = [element.text or "" for element in root.iter("text")]
        headings = [element.text for element in root.iter("text") if element.attrib.get("class") == "heading"]
        assert headings == [
            "Loss, nats per token",
            "Gradient norm",
            "Learning rate",
            "Throughput, tokens per second",
            "Nodes in training",
        ]
        assert texts.count("step") == 1
        assert [link.attrib["href"] for link in root.iter("a")] == ["#12-i000"]
        assert [text for text in texts if text == "i000"] == ["i000"]
        inner = size.width - size.left - size.right
        for element in root.iter("path"):
            if element.attrib["class"].startswith("line"):
                xs = [float(x) for x, _ in re.findall(r"([-\d.]+) ([-\d.]+)", element.attrib["d"])]
                assert all(0 <= x <= inner for x in xs)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8), st.booleans())
def test_ticks_are_few_round_and_in_the_range(low: float, span: float, most: int, whole: bool):
    scale = Scale(low=low, high=low + span, pixels=100)
    ticks = scale.ticks(most, whole=whole)
    assert len(ticks) <= most + 1
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert not whole or all(tick == int(tick) for tick in ticks)
    gaps = [b - a for a, b in pairwise(ticks)]
    assert all(math.isclose(gap, gaps[0], rel_tol=1e-3) for gap in gaps)


@given(st.floats(1e-6, 1e3), st.floats(1.1, 1e6), st.integers(3, 6))
def test_ticks_of_a_logarithmic_axis(low: float, times: float, most: int):
    scale = Scale(low=low, high=low * times, pixels=100, log=True)
    ticks = scale.ticks(most)
    assert len(ticks) <= most
    assert ticks == sorted(ticks)
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)


def test_axis_labels_read_well():
    assert Scale(low=4.8, high=7.9, pixels=190).ticks(5) == [5, 6, 7]
    assert Scale(low=-6e-5, high=1.4e-3, pixels=104).ticks(3) == [0, 5e-4, 1e-3]
    assert Scale(low=0.3, high=0.7, pixels=190).ticks(5) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert Scale(low=1, high=600, pixels=754).ticks(8, (1, 2, 2.5, 5), whole=True) == [100, 200, 300, 400, 500, 600]
    assert Scale(low=0.25, high=4.5, pixels=104, log=True).ticks(6) == [0.5, 1, 2]


def test_a_peak_beyond_a_panel_is_written_in_full():
    record = load(LINEAGE)
    part = record.curves[2]
    points = [replace(p, lr=0.0421234) if p.step == 280 else p for p in part.points]
    record = replace(record, curves=[*record.curves[:2], replace(part, points=points), record.curves[3]])
    assert all(">4.21234e-2<" in svg for svg in drawn_of(record))
