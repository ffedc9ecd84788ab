"""`opt-ops why`: the newest incident in six lines."""

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import told
from tests.commands import opt_ops
from tests.core.story import Story


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lineage 12 with a rollback and a drill, nobody watches it."""
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


def test_the_newest_incident_in_six_lines(site: Path):
    done = opt_ops(site, "why")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), done.stderr) == (0, 6, "lineage 12\n")
    assert lines[0].startswith("12-i001, bad GPU: n2")
    assert "DRILL d000" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["since", "did", "cost", "now", "next"]
    assert "and nobody watches" in lines[4]
    assert lines[5] == "  next   opt-ops daemon ensure   or   opt-ops explain 12-i001"


def test_the_one_that_is_named(site: Path):
    (row,) = json.loads(opt_ops(site, "why", "12-i000", "-o", "json").stdout)["items"]
    assert row["incident"] == "12-i000"
    assert row["what"].startswith("12-i000, loss spike: ")
    assert "learning rate × 0.75" in row["did"]
    assert "discarded" in row["cost"]
    assert len(row["next"]) == 2
    shown = opt_ops(site, "why", "12-i000").stdout
    assert row["what"] in shown
    assert row["cost"] in shown


def test_nothing_has_happened(tmp_path: Path):
    Story().training(100).save(tmp_path / "runs" / "12")
    done = opt_ops(tmp_path, "why")
    assert done.stdout == "12: nothing has happened since 1970-01-01 00:16:42Z, when it was started. It is TRAINING.\n"
    assert json.loads(opt_ops(tmp_path, "why", "-o", "json").stdout) == {"schema": "opt-ops/why/1", "items": []}
