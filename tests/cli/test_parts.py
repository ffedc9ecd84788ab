"""`opt-ops node ledger` and the way back of a node: what is known against it is shown, and it may be tested first."""

import json
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import GpuPart, Verdict
from opt_ops.runfolder.journal import Journal
from tests.commands import opt_ops
from tests.core.story import Story
from tests.fake_nvml.build import FakeDriver


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Lineage 12, whose n2 was taken out for GPU-b, while the attempt goes on elsewhere."""
    story = Story()
    story.begin()
    story.hold()
    for node, uuid in (("n1", "GPU-a"), ("n2", "GPU-b")):
        said = {"verdict": Verdict.HEALTHY, "reason": "ok", "source": "test", "at": story.now}
        story.see(e.NodeJudged(node=node, host=node, gpus=(GpuPart(uuid=uuid, serial="1", name="H100"),), **said))
    story.train(100)
    bad = {"verdict": Verdict.BAD, "reason": "xid_79", "source": "test", "at": story.now}
    story.see(e.NodeJudged(node="n2", host="n2", evidence={"uuid": "GPU-b", "serial": "1"}, **bad))
    story.ends()
    assert story.state.nodes["n2"].excluded_by == "12-i000"
    journal = Journal(tmp_path / "runs" / "12" / "journal")
    for entry in story.entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    return tmp_path


def test_the_ledger_names_what_failed_with_its_incidents(site: Path):
    heading, *lines = opt_ops(site, "node", "ledger").stdout.splitlines()
    assert heading.split("\t")[:2] == ["PART", "NODE"]
    assert {line.split("\t")[0] for line in lines} == {"GPU-b", "n2"}
    told = json.loads(opt_ops(site, "node", "ledger", "12", "--all", "-o", "json").stdout)
    assert told["schema"] == "opt-ops/node-ledger/1"
    found = {row["part"]: row for row in told["items"]}
    assert set(found) == {"GPU-a", "GPU-b", "n1", "n2", "n3"}
    assert [each["cause"] for each in found["GPU-b"]["incidents"]] == ["n2: xid_79"]
    assert (found["GPU-b"]["lemon"], found["n2"]["excluded_by"], found["GPU-a"]["failures"]) == (False, "12-i000", 0)


def test_an_empty_site_has_an_empty_ledger(tmp_path: Path):
    (tmp_path / "opt-ops.toml").write_text("")
    assert json.loads(opt_ops(tmp_path, "node", "ledger", "-o", "json").stdout)["items"] == []


def test_why_a_node_was_taken_out_is_read_again_before_it_returns(site: Path):
    done = opt_ops(site, "node", "allow", "12", "n2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "n2 was excluded by 12-i000" in done.stderr
    assert "n2: xid_79" in done.stderr
    assert "GPU-b, serial 1: 1 failure in " in done.stderr
    asked = opt_ops(site, "node", "allow", "12", "n2")
    assert (asked.returncode, "without a test (--retest)" in asked.stderr) == (4, True)


def test_only_a_fit_node_returns_when_it_is_tested_again(
    site: Path, tmp_path: Path, nvml_library: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    fit = opt_ops(site, "node", "allow", "12", "n2", "--retest", "--dry-run")
    assert fit.returncode == 0, fit.stderr
    assert "burnt in" in fit.stderr
    driver = FakeDriver(tmp_path, gpus=2, library=nvml_library)
    for name, value in driver.env.items():
        monkeypatch.setenv(name, value)
    driver.set(1, ecc_volatile_uncorrected=1)
    unfit = opt_ops(site, "node", "allow", "12", "n2", "--retest", "--dry-run")
    assert unfit.returncode == 4
    assert "failed the test and stays excluded: CRITICAL - ecc_uncorrected on n2" in unfit.stderr
