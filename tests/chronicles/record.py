"""Makes the recorded lineage that these tests read, and draws the golden files of it again.

    python -m tests.chronicles.record runs/1    # record another lineage, then draw
    python -m tests.chronicles.record           # only draw: after a change of the logbook that is meant

Host names, paths and people are replaced; telemetry keeps the fields that the chronicle reads; shards and logs stay
out.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

from chronicles.logbook.render import render

DATA = Path(__file__).parent / "data"
LINEAGE = DATA / "1"
GOLDEN = DATA / "golden"

_FIELDS = ("ts", "num_updates", "loss", "gnorm", "lr", "betas", "weight_decay", "clip_norm", "loss_scale", "finite")
_FIELDS += ("step_seconds", "wps", "tokens", "tflops")


def record(source: Path) -> None:
    """Copy what the tests need of a lineage's folder."""
    shutil.rmtree(LINEAGE, ignore_errors=True)
    for path in sorted((source / "journal").glob("*.jsonl")):
        entries = [_anonymous(json.loads(line), source.name) for line in path.read_bytes().splitlines()]
        _write(LINEAGE / "journal" / path.name, b"".join(map(_line, entries)))
    for path in sorted(source.glob("*/*/telemetry.jsonl")):
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        lines = [json.dumps({field: _rounded(field, row.get(field)) for field in _FIELDS}) + "\n" for row in rows]
        _write(LINEAGE / path.relative_to(source), "".join(lines).encode())
    for path in sorted(source.glob("*/*/config.json")):
        config = _anonymous(json.loads(path.read_bytes()), source.name)
        _write(LINEAGE / path.relative_to(source), (json.dumps(config) + "\n").encode())


def draw() -> None:
    """The golden files."""
    folder = DATA / "1.drawn" / "1"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(LINEAGE, folder)
    GOLDEN.mkdir(exist_ok=True)
    markdown, _, report = render(folder)
    shutil.copyfile(markdown, GOLDEN / markdown.name)
    (GOLDEN / report.name).write_text(json.dumps(json.loads(report.read_text()), indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder.parent)


def _anonymous(value: Any, lineage: str) -> Any:
    if isinstance(value, dict):
        named = {"host": "head", "author": "ann"}
        return {key: named[key] if key in named else _anonymous(item, lineage) for key, item in value.items()}
    if isinstance(value, list):
        return [_anonymous(item, lineage) for item in value]
    return re.sub(rf"/\S*/runs/{lineage}(?=/)", f"/runs/{lineage}", value) if isinstance(value, str) else value


def _line(entry: dict[str, Any]) -> bytes:
    body = json.dumps({key: entry[key] for key in entry if key != "crc"}, ensure_ascii=False)[:-1].encode()
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


def _rounded(field: str, value: Any) -> Any:
    exact = not isinstance(value, float) or field == "lr"  # the proof compares learning rates to the last digit
    return value if exact else round(value, 6)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
    draw()
