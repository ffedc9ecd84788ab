"""The committed example in Chromium: how long it is on a phone, and what a reader of it sees first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

EXAMPLE = Path(__file__).parents[3] / "chronicles" / "examples" / "opt-175b" / "logbook.html"
TALLEST = 60_000  # pixels on a phone: operator-experience.md, part 10


@pytest.fixture(scope="module")
def example(browser: Any) -> Any:
    """The page, opened once: that takes longer than all that is looked at."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(180_000)
    page.goto(EXAMPLE.as_uri())
    return page


def sized(page: Any, width: int, height: int) -> Any:
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("width => innerWidth === width", arg=width)
    return page


def test_it_is_short_enough_for_a_phone_and_nothing_scrolls_sideways(example: Any):
    page = sized(example, 390, 844)
    assert page.evaluate("document.documentElement.scrollHeight") <= TALLEST
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.querySelector('.simulated')).position") == "static"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (760, 900), (390, 844)])
def test_the_banner_covers_no_heading_that_a_link_leads_to(example: Any, width: int, height: int):
    page = sized(example, width, height)
    covered = """anchors => anchors.filter(anchor => {
      location.hash = "#" + anchor;
      dispatchEvent(new HashChangeEvent("hashchange"));
      const head = document.getElementById(anchor).querySelector("h3"), box = head.getBoundingClientRect();
      return !head.contains(document.elementFromPoint(box.left + 4, box.top + 4));
    })"""
    anchors = page.eval_on_selector_all("article.large", "all => all.map(e => e.id)")
    assert len(anchors) > 5
    assert page.evaluate(covered, anchors[:3] + anchors[-3:]) == []


def test_of_many_incidents_few_are_named_on_the_curves_and_all_are_marked(example: Any):
    page = sized(example, 1280, 900)
    names = page.locator("svg.wide .names a").count()
    ticks = page.locator("svg.wide .tick").count()
    assert 0 < names <= 40
    assert ticks > names
    assert page.locator("svg.wide .hit title, svg.wide .at title").count() >= ticks + names
    assert page.locator("#story h3").count() >= 3
