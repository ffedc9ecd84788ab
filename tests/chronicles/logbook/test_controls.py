"""What a reader does with the page: filter, order, search, open, follow links, read values from the curves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chronicles.logbook.drawing import html
from chronicles.logbook.drawing.log_rows import StepAxis, log
from chronicles.logbook.entries.build import entries
from chronicles.logbook.entries.entry import LogEntry
from chronicles.logbook.front_page import front_page
from chronicles.logbook.render import drawings
from chronicles.logbook.story.model import Afterthought, Fold, Paragraph, Story, StoryEntry
from chronicles.record import LineageRecord, Moment, load
from chronicles.report.build import build
from chronicles.report.model import LineageReport
from chronicles.wording import stamps
from tests.chronicles.record import LINEAGE

pytestmark = pytest.mark.browser

IDS = ["e2", "1-i000", "1-i002", "1-i003", "e99"]  # of the entries, oldest first; 1-i001 is folded into 1-i000


def single(entry: LogEntry) -> StoryEntry:
    return StoryEntry(
        anchor=entry.anchor,
        begin=Moment(entry.ts),
        end=Moment(entry.ts),
        rule=Fold.SINGLE,
        title=entry.title,
        large=True,
        first=False,
        worst=False,
        steps_lost=None,
        seconds_down=None,
        members=(entry.anchor,),
        entries=(entry,),
    )


def told_by_hand(record: LineageRecord, report: LineageReport) -> Story:
    """Two restarts as one entry, the others as they are, a paragraph and an afterthought."""
    log = sorted(entries(record, report), key=lambda entry: entry.ts)
    first, one, two, *rest = [single(entry) for entry in log]
    both = replace(
        one,
        end=two.end,
        rule=Fold.CHAIN,
        title="Two restarts within a minute",
        members=(one.anchor, two.anchor),
        entries=(*one.entries, *two.entries),
        text=("A rank was killed, then a GPU was gone.",),
    )
    kinds = {first.anchor: ("people",), one.anchor: ("hardware", "drill"), rest[0].anchor: ("drill", "routine")}
    kinds |= {rest[1].anchor: ("rollback", "loss", "drill"), rest[2].anchor: ("routine",)}
    folded = tuple(replace(entry, kinds=kinds[entry.anchor]) for entry in (first, both, *rest))
    phase = Paragraph(
        title="A short run.",
        begin=first.begin,
        end=rest[-1].end,
        first_step=1,
        last_step=600,
        text="Four drills, one rollback.",
        anchors=(rest[1].anchor,),
    )
    later = Afterthought(
        anchor=rest[1].anchor,
        at=Moment(rest[1].end + 60),
        kind="passed",
        verdict="worked",
        text="Training passed the place.",
        because=(),
        next="opt-ops run explain 1",
    )
    return Story(summary=(phase,), words=10, entries=folded, strategies=(), afterthoughts=(later,))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    record = load(LINEAGE)
    report = build(record)
    story = told_by_hand(record, report)
    path = tmp_path_factory.mktemp("controls") / "logbook.html"
    path.write_text(html.logbook(report, front_page(report, 5.0), story, drawings(record, report, story)))
    return path


def opened(browser: Any, url: str, width: int = 1280, **more: Any) -> Any:
    page = browser.new_context(viewport={"width": width, "height": 844}, **more).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    return page


def in_page(browser: Any, site: Path) -> Any:
    return opened(browser, site.as_uri()).main_frame


def in_a_frame_without_origin(browser: Any, site: Path) -> Any:
    """As MLflow shows it: a sandboxed frame, in which storage throws and the address cannot be set."""
    page = opened(browser, "about:blank")
    page.set_content('<iframe sandbox="allow-scripts" style="width: 1200px; height: 800px"></iframe>')
    page.evaluate("text => document.querySelector('iframe').srcdoc = text", site.read_text())
    page.frame_locator("iframe").locator("#controls").wait_for()
    return page.frames[1]


def shown(frame: Any) -> list[str]:
    return frame.eval_on_selector_all("article", "all => all.filter(e => e.checkVisibility()).map(e => e.id)")


def hash_of(frame: Any) -> str:
    return frame.evaluate("location.hash")


@pytest.mark.parametrize("show", [in_page, in_a_frame_without_origin])
def test_each_control_does_what_it_says(browser: Any, site: Path, show: Callable[[Any, Path], Any]):
    frame = show(browser, site)
    noise: list[str] = []
    frame.page.on("pageerror", lambda error: noise.append(str(error)))
    assert shown(frame) == IDS, "oldest first, because the lineage has ended"
    labels = {each.get_attribute("data-filter"): each.inner_text() for each in frame.locator("[data-filter]").all()}
    assert labels == {
        "rollback": "Rollbacks 1",
        "people": "People 1",
        "hardware": "Hardware 1",
        "loss": "Loss 1",
        "drill": "Drills 3",
        "routine": "Routine 2",
    }
    rollback = frame.locator("[data-filter=rollback]")
    rollback.click()
    assert (shown(frame), frame.locator("#shown").inner_text()) == (["1-i003"], "1 of 5")
    assert rollback.get_attribute("aria-pressed") == "true"
    frame.locator("[data-filter=people]").click()
    assert shown(frame) == ["e2", "1-i003"], "what is of any of these kinds"
    frame.locator("#order").click()
    assert shown(frame) == ["1-i003", "e2"]
    assert frame.locator("#order").inner_text() == "Newest first"
    rollback.click()
    frame.locator("[data-filter=people]").click()
    assert shown(frame) == IDS[::-1]
    search = frame.locator("#search")
    search.fill("XID_79 gone")
    assert (shown(frame), frame.locator("#shown").inner_text()) == (["1-i000"], "1 of 5"), "with its evidence"
    search.press("Escape")
    assert (shown(frame), search.input_value(), frame.locator("#shown").inner_text()) == (IDS[::-1], "", "")
    details = "all => [...new Set(all.map(e => e.open))]"
    assert frame.eval_on_selector_all("details.evidence", details) == [True], "a short log is open"
    frame.locator("#expand").click()
    assert frame.eval_on_selector_all("details.evidence", details) == [False]
    assert frame.locator("#expand").get_attribute("aria-expanded") == "false"
    frame.locator("[data-filter=loss]").click()
    frame.locator("#incidents ~ * a", has_text="1-i001").first.click()
    frame.locator("#\\31 -i001").wait_for()  # told of the link, the page opens what folds it and ends the filter
    frame.wait_for_function("document.getElementById('1-i001').getBoundingClientRect().top < innerHeight")
    assert noise == []


def test_the_fragment_is_a_link_to_a_state(browser: Any, site: Path):
    page = opened(browser, f"{site.as_uri()}#?kind=drill,halt&order=newest&q=rank%201")
    assert shown(page) == ["1-i003", "1-i002", "1-i000"][-len(shown(page)) :]
    assert page.locator("#search").input_value() == "rank 1"
    assert page.locator("[data-filter=drill]").get_attribute("aria-pressed") == "true"
    page.locator("#search").press("Escape")
    assert hash_of(page) == "#?kind=drill&order=newest"
    page.locator("#order").click()
    page.locator("[data-filter=drill]").click()
    assert "?" not in hash_of(page)
    page.goto(f"{site.as_uri()}#1-i001")
    page.locator("#\\31 -i001").wait_for()
    page.locator("#search").fill("50 % & more")
    assert hash_of(page) == "#?q=50%20%25%20%26%20more"
    page.reload()
    assert page.locator("#search").input_value() == "50 % & more"


def test_without_scripts_everything_is_there(browser: Any, site: Path):
    page = opened(browser, f"{site.as_uri()}#1-i003", java_script_enabled=False)
    assert page.locator("article").count() == len(IDS)
    assert all(article.is_visible() for article in page.locator("article").all())
    hidden = [page.locator(name) for name in ("#controls", "#readout", "#chart-help", "button.zoom >> nth=0")]
    assert not any(each.is_visible() for each in hidden)
    assert page.get_by_text("Four drills, one rollback.").is_visible()
    assert page.get_by_text("Added 14:18: Training passed the place.").is_visible()
    summary = page.locator("#\\31 -i000 details.evidence > summary")
    summary.click()
    assert not page.locator("#\\31 -i001").is_visible()
    summary.click()
    assert page.locator("#\\31 -i001").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_heading_that_a_link_leads_to_is_not_covered(browser: Any, site: Path, width: int):
    page = opened(browser, f"{site.as_uri()}#1-i003", width)
    covered = """() => { const e = document.querySelector("article.target h3"), box = e.getBoundingClientRect();
      return !e.contains(document.elementFromPoint(box.left + 5, box.top + 5)); }"""
    assert page.evaluate(covered) is False


def test_on_a_phone_evidence_is_closed_and_on_paper_it_is_open(browser: Any, site: Path):
    page = opened(browser, site.as_uri(), 390)
    details = "all => [...new Set(all.map(e => e.open))]"
    assert page.eval_on_selector_all("details.evidence", details) == [False]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.eval_on_selector_all("details", details) == [True]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.eval_on_selector_all("details.evidence", details) == [False]


def test_curves_tell_their_values_and_are_drawn_larger(browser: Any, site: Path):
    page = opened(browser, site.as_uri())
    chart, svg = page.locator("#chart"), page.locator("svg.wide")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    scale, left = box["width"] / 820, 46
    across = lambda step: box["x"] + scale * (left + (820 - left - 20) * (step - 1) / 599)  # noqa: E731
    page.mouse.move(across(100), box["y"] + 150)
    told = dict(re.findall(r"(step|run|loss|gradient norm|learning rate|tokens/s|nodes)\s+(\S+)", readout(page)))
    point = next(point for each in load(LINEAGE).curves[1:2] for point in each.points if point.step == 100)
    assert point.loss is not None
    assert set(told) == {"step", "run", "loss", "gradient norm", "learning rate", "tokens/s", "nodes"}
    assert (told["step"], told["run"], told["nodes"]) == ("100", "1.00", "2")
    assert float(told["loss"]) == pytest.approx(point.loss, abs=2e-3)
    assert "2026-11-22 14:16 UTC" in readout(page)
    page.mouse.down()
    page.mouse.move(across(250), box["y"] + 150, steps=4)
    page.mouse.up()
    low, high = map(int, chart.get_attribute("data-range").split())
    assert (abs(low - 100) <= 1, abs(high - 250) <= 1) == (True, True)
    labels = svg.locator(".steps text").all_text_contents()
    assert all(low <= int(label) <= high for label in labels[:-1])
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert re.search(r"step 17\d", readout(page).replace("\n", " "))
    page.keyboard.press("Escape")
    assert chart.get_attribute("data-range") == "1 600"
    assert "6" in svg.locator("[data-measure=loss] text").all_text_contents(), "the whole drawing is back"


def test_of_a_lineage_that_goes_on_the_newest_entry_stands_first():
    record = load(LINEAGE)
    story = told_by_hand(record, build(record))
    rows = log(story, ended=False, axis=StepAxis()).rows
    assert [row.told.anchor for row in rows] == IDS[::-1]
    assert all(row.zoom is None for row in rows), "without curves there is nothing to draw larger"


def readout(page: Any) -> str:
    return page.locator("#readout").inner_text()


def test_neighbours_of_one_minute_show_their_seconds():
    assert stamps([0.0, 61.0, 65.0, 125.0]) == [
        "1970-01-01 00:00",
        "1970-01-01 00:01:01",
        "1970-01-01 00:01:05",
        "1970-01-01 00:02",
    ]
