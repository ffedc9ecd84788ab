"""The page of a comparison in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chronicles.comparison.page import page
from tests.chronicles.comparison.test_compare import compared, forked
from tests.chronicles.logbook.test_browser import opened
from tests.chronicles.told import Told

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_it_is_quiet_fits_a_phone_and_reads_out_both_curves(browser: Any, tmp_path: Path):
    told = Told(tmp_path / "12")
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    fork = forked(told, "13", "12.00", 100, 300)
    for each in (told, fork):
        each.evaluated(200).evaluated(200, task="a_task_with_a_very_long_name_" * 3)
    file = tmp_path / "compare.html"
    file.write_text(page(compared(told.folder, fork.folder)))
    for width in (1280, 390):
        shown, noise = opened(browser, file.as_uri(), width)
        assert noise == []
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        chart = shown.locator("#chart")
        chart.focus()
        chart.press("ArrowRight")  # from the middle, which both have
        readout = shown.locator("#readout").inner_text()
        assert "loss of 12" in readout
        assert "loss of 13" in readout
        shown.close()
