"""The names of telemetry's fields, and a file of whole lines."""

import json
import re
from pathlib import Path

import pytest

from opt_ops.contract.telemetry import LineFile, TelemetryLine

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


def test_each_field_is_documented() -> None:
    text = FORMATS.read_text(encoding="utf-8")
    section = text[text.index("### telemetry.jsonl") : text.index("### phases.jsonl")]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == TelemetryLine.__annotations__.keys()


def test_lines_are_appended_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"line": 0}\n')
    lines = LineFile(path)
    assert lines.write({"line": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        lines.write({"line": float("nan")})
    assert [json.loads(line)["line"] for line in path.read_text().splitlines()] == [0, 1]
