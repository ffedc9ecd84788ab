"""`opt-ops compare`: which two lineages it takes, and what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chronicles.comparison.test_compare import forked
from tests.chronicles.told import Told
from tests.commands import opt_ops


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lineages 12, a fork of it, 13, and 14, which has nothing to do with them."""
    folder = tmp_path_factory.mktemp("site")
    told = Told(folder / "runs" / "12")
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    fork = forked(told, "13", "12.00", 100, 300)
    told.evaluated(200, value=0.5)
    fork.evaluated(180, value=0.6)
    Told(folder / "runs" / "14").begin()
    for number, rate in (("12", 0.001), ("13", 0.0005)):
        config = {"ts": rate, "settings": {"optim": {"peak_lr": rate}}, "schedule": {"peak_lr": rate}}
        (folder / "runs" / number / f"{number}.00" / "a0" / "config.json").write_text(json.dumps(config))
    return folder


def test_without_arguments_the_two_newest_of_one_family_are_compared(site: Path):
    (item,) = json.loads(opt_ops(site, "compare", "-o", "json").stdout)["items"]
    assert item["lineages"] == ["12", "13"]
    assert item["settings"] == [{"key": "settings.optim.peak_lr", "values": [0.001, 0.0005]}]
    assert item["verdict"]["better"] == "13"


def test_people_read_tables_and_a_sentence(site: Path):
    lines = opt_ops(site, "compare", "13", "12").stdout.splitlines()
    assert lines[0] == "Lineage 13 goes on from step 100 of 12.00."
    assert lines[-1].startswith("Lineage 13 is better: its mean loss is 0.0500 below that of 12")
    assert "settings.optim.peak_lr\t0.0005\t0.001" in lines
    assert "hellaswag acc_norm\t180 and 200\t0.600 ± 0.01\t0.500 ± 0.01\t−0.100\t13 is better (7.1 SE)" in lines
    curves = [line for line in lines if line[:5] in ("   12", "   13")]
    assert len(curves) == 2
    assert set("".join(curves)) <= set(" 123▁▂▃▄▅▆▇█")


def test_a_page_is_written_and_mistakes_are_named(site: Path):
    assert opt_ops(site, "compare", "12", "14", "--html", "page.html").returncode == 0
    assert "Lineages 12 and 14 have no common ancestor." in (site / "page.html").read_text()
    same = opt_ops(site, "compare", "12", "12.00")
    assert (same.returncode, "12 and 12.00 are the same lineage" in same.stderr) == (2, True)
    assert opt_ops(site, "compare", "12").returncode == 2
    assert opt_ops(site, "compare", "12", "99").returncode == 3
