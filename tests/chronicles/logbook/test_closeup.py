"""The small curve of an incident: 200 steps around it, what is kept and what is discarded."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from chronicles.logbook.drawing.closeup import Closeups, caption
from chronicles.record import load
from chronicles.report.build import build
from opt_ops.core.values import Action, Outcome
from tests.chronicles.told import Told, falling, spiked

COLORS = {"12.00": "run-0", "12.01": "run-1"}


def drawn(told: Told) -> ET.Element:
    record = load(told.folder)
    return ET.fromstring(Closeups(record, COLORS).draw(build(record).incidents[0]))


def test_it_shows_what_is_kept_and_what_is_discarded(told: Told):
    root = drawn(spiked(told))
    lines = [element.attrib["class"] for element in root if element.attrib.get("class", "").startswith("line")]
    assert sorted(lines) == ["line run-0", "line run-0 gone", "line run-1"]
    assert [element.text for element in root if element.tag == "text"][2:] == ["1", "200"]


def test_a_window_of_400_steps_of_a_long_run(told: Told):
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 300)
    point = told.save("12.00", 290)
    incident = told.incident("process_death", "killed", "12.00-a0", 300)
    told.decide(incident, Action.RESTART).end("12.00-a0", Outcome.FAILED, 300)
    told.launch("12.00-a1", point, incident).train("12.00-a1", 291, 600).close(incident)
    root = drawn(told)
    assert root.attrib["aria-label"] == "Loss from step 100 to 500"
    lines = [element.attrib["d"] for element in root if element.attrib.get("class", "").startswith("line")]
    for line in lines:
        points = re.findall(r"(\d+) (-?\d+)", line)
        assert len(points) <= 150
        assert all(36 <= int(x) <= 332 and 0 <= int(y) <= 96 for x, y in points)


def test_a_wild_peak_does_not_flatten_the_curve(told: Told):
    wild = lambda step: 1e6 if step == 150 else falling(step)  # noqa: E731
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200, loss=wild)
    told.incident("loss_spike", "x", "12.00-a0", 200)
    heights = [float(element.text or "nan") for element in drawn(told) if element.tag == "text"][:2]
    assert max(heights) < 100


def test_nothing_to_draw(told: Told):
    told.begin().plan("12.00").hold()
    told.incident("bad_gpu", "x", None, None)
    record = load(told.folder)
    assert Closeups(record, COLORS).draw(build(record).incidents[0]) == ""
    told.launch("12.00-a0").train("12.00-a0", 1, 30, loss=lambda step: None)
    told.incident("non_finite_loss", "x", "12.00-a0", 30)
    record = load(told.folder)
    assert Closeups(record, COLORS).draw(build(record).incidents[1]) == ""


def test_a_rollback_has_one_arrow_and_its_whole_peak(told: Told):
    diverged = lambda step: 9.0 if step >= 160 else 2.5 + 0.01 * (step % 7)  # noqa: E731
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 180, loss=diverged)
    point = told.save("12.00", 100)
    incident = told.incident("loss_spike", "loss 9", "12.00-a0", 180, onset_step=160)
    told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=0.75).end("12.00-a0", Outcome.STOPPED, 180)
    told.plan("12.01", "12.00", point, [(100, 0.75)], incident).launch("12.01-a0", point, incident)
    told.train("12.01-a0", 101, 400, loss=lambda step: 2.5).close(incident)
    (row,) = build(load(told.folder)).incidents
    svg = Closeups(load(told.folder), COLORS).draw(row)
    assert (svg.count('class="arrow"'), svg.count('class="stop"')) == (1, 0)
    assert "9" in [element.text for element in ET.fromstring(svg) if element.tag == "text"], "the peak is not cut"
    assert caption(row) == (
        "The arrow is at step 160, where the loss left its band. Steps 101 to 180 were discarded (dashed) and trained "
        "again, learning rate × 0.75."
    )
