"""Evaluations and completed prompts in Chromium: on a phone, without scripts, in print, and whatever a model says."""

from __future__ import annotations

from typing import Any

import pytest

from chronicles.logbook.render import render
from tests.chronicles.logbook.test_browser import opened
from tests.chronicles.told import Told

pytestmark = pytest.mark.browser

ATTACK = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title = 'taken over'\">"
LONG = "A sentence that a small model says again and again. " * 60
WIDE = "x" * 600


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    told = Told(tmp_path_factory.mktemp("runs") / "12").begin().plan("12.00").hold()
    told.launch("12.00-a0").train("12.00-a0", 1, 200)
    for step in (50, 100, 150):
        told.evaluated(step, value=step / 300).evaluated(step, task="a_task_with_a_very_long_name_" * 3, metric="f1")
        told.sampled(step, (ATTACK, LONG, f"\x1b[31m{ATTACK}"), ("Wide", WIDE, "short"))
    return render(told.folder)[1].as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_nothing_that_a_model_says_runs(browser: Any, page_file: str, width: int):
    page, noise = opened(browser, page_file, width)
    assert noise == []
    assert page.title() == "Lineage 12: logbook"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = "all => all.filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).length"
    assert width > 600 or page.eval_on_selector_all("#prompts ~ * .scroll, #evaluations ~ .scroll", wide) == 0
    assert page.locator(".scores figure").count() == 2
    assert page.locator(".said", has_text="onerror").count() == 4, "it shows itself"


def test_a_long_text_is_folded_and_opens_without_scripts(browser: Any, page_file: str):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 800, "height": 900})
    context.set_default_timeout(180_000)
    page = context.new_page()
    page.goto(page_file)
    folded = page.locator("details.said").first
    assert folded.locator("summary").inner_text().endswith("…")
    assert folded.get_attribute("open") is None
    folded.locator("summary").click()
    assert folded.get_attribute("open") is not None
    assert page.locator("#evaluations").is_visible()
    assert page.locator("td", has_text="0.500 ± 0.01").first.is_visible()


def test_in_print_nothing_is_folded(browser: Any, page_file: str):
    page, _ = opened(browser, page_file)
    page.emulate_media(media="print")
    body = page.locator("details.said").first
    assert body.evaluate("e => e.getBoundingClientRect().height > 3 * e.querySelector('summary').clientHeight")
