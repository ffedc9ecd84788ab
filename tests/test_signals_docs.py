"""docs/signals.md has the numbers that the detectors go by."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_detectors_is_what_the_code_says():
    from scripts.signals_docs import page

    text = (ROOT / "docs" / "signals.md").read_text(encoding="utf-8")
    assert page(text) == text, "python scripts/signals_docs.py"
