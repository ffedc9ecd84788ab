"""docs/contract.md has the example as it is, and names what exists."""

from __future__ import annotations

import re
from pathlib import Path

from opt_ops import contract
from opt_ops.contract.run_folder import TELEMETRY_FIELDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "examples" / "contract_trainer.py").read_text(encoding="utf-8")


def test_the_page_holds_the_example_word_for_word() -> None:
    assert f"```python\n{EXAMPLE}```" in PAGE
    assert len(EXAMPLE.splitlines()) <= 60


def test_what_the_page_says_does_it_exists() -> None:
    named = {name for row in PAGE.splitlines() if row.startswith("|") for name in _names(row)}
    assert {"Outside", "RunFolder.telemetry", "parse", "commit"} <= named
    for name in named:
        first, _, attribute = name.partition(".")
        assert first in contract.__all__, name
        fields = getattr(getattr(contract, first), "__dataclass_fields__", {})
        assert not attribute or attribute in fields or hasattr(getattr(contract, first), attribute), name


def _names(row: str) -> list[str]:
    last = row.rstrip("| ").rpartition("|")[2]
    return [name for name in re.findall(r"`([A-Za-z_.]+)", last) if name != "before_marker"]


def test_the_thirteen_fields() -> None:
    assert len(TELEMETRY_FIELDS) == 13
    assert all(f"`{name}`" in PAGE for name in TELEMETRY_FIELDS)
