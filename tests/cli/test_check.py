"""`opt-ops node check`: Nagios' codes and one line for monitors, JSON for programs, from fresh readings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opt_ops.runfolder.journal import Journal
from tests.commands import opt_ops
from tests.core.story import Story
from tests.fake_nvml.build import FakeDriver


def check(folder: Path, *options: str, code: int) -> str:
    """Of a new interpreter, since the environment of its start says which driver is loaded."""
    command = [sys.executable, "-m", "opt_ops", "node", "check", *options]
    return said_by(subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240), code)


def check_without_driver(folder: Path, *options: str, code: int) -> str:
    return said_by(opt_ops(folder, "node", "check", *options), code)


def said_by(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def item(folder: Path, *options: str, code: int) -> dict[str, Any]:
    told = json.loads(check(folder, *options, "-o", "json", code=code))
    assert told["schema"] == "opt-ops/node-check/1"
    (only,) = told["items"]
    return only


@pytest.fixture
def driver(tmp_path: Path, nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver(tmp_path, gpus=2, library=nvml_library)
    for name, value in driver.env.items():
        monkeypatch.setenv(name, value)
    return driver


def test_nagios_codes_and_one_line(tmp_path: Path, driver: FakeDriver):
    assert re.fullmatch(r"OK - (no rule of the table applies|clock_unset on \S+) - 2 GPUs\n", check(tmp_path, code=0))
    driver.set(0, remap_pending=True)
    assert check(tmp_path, code=1).startswith("WARNING - remap_pending on ")
    driver.set(1, ecc_volatile_uncorrected=1)
    first, *others = check(tmp_path, code=2).splitlines()
    assert first.startswith("CRITICAL - ecc_uncorrected on ")
    found = [line.split("\t")[2] for line in others]
    assert [each for each in found if each != "clock_unset"] == ["ecc_uncorrected", "remap_pending"], "the worst first"
    driver.unload()
    assert check(tmp_path, code=3).startswith("UNKNOWN - nvml_driver_not_loaded on ")


def test_json_has_every_finding_with_its_evidence(tmp_path: Path, driver: FakeDriver):
    driver.set(1, remap_pending=True, temperature=91)
    said = item(tmp_path, code=1)
    assert (said["verdict"], said["gpus"], said["burn_in"]) == ("suspect", 2, None)
    found = {each["reason"]: each["evidence"] for each in said["findings"]}
    assert set(found) - {"clock_unset"} == {"remap_pending", "too_hot"}
    assert found["too_hot"]["temperature"] == 91


def test_a_mistake_is_unknown_and_never_critical(tmp_path: Path):
    assert check_without_driver(tmp_path, "--fly", code=3).startswith(
        "UNKNOWN - opt-ops node check: No such option: --fly"
    )
    (tmp_path / "opt-ops.toml").write_text("[health]\ngpus = 8\n")
    assert "health.gpus: unknown key" in check_without_driver(tmp_path, code=3)


def test_gpus_that_are_missed_and_gpus_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    if " 0 GPUs" not in check(tmp_path, code=0):
        pytest.skip("this machine has GPUs")
    assert check(tmp_path, code=0).startswith("NO GPU - none was found, so none was checked; ")
    (tmp_path / "opt-ops.toml").write_text("[health]\ngpus_per_node = 8\n")
    assert check(tmp_path, code=3).startswith("UNKNOWN - nvml_absent on ")


def test_nodes_are_burnt_in_by_real_ranks(tmp_path: Path):
    both = check(tmp_path, "n1", "n2", "--burn-in", "--seconds", "60", "--drill", "n2:wrong-gemm", "-o", "json", code=2)
    n1, n2 = json.loads(both)["items"]
    assert (n1["node"], n1["verdict"]) == ("n1", "healthy")
    assert (n2["reason"], n2["findings"][0]["drill"]) == ("burn_in_wrong", "node check --drill n2:wrong-gemm")
    assert len(n1["burn_in"]["rounds"]) == 1


def test_nodes_on_which_an_attempt_runs_are_not_burnt_in(tmp_path: Path):
    journal = Journal(tmp_path / "runs" / "12" / "journal")
    for entry in Story().training(100).entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    refused = check_without_driver(tmp_path, "--lineage", "12", "--burn-in", code=3)
    assert "attempt 12.00-a0 runs on these nodes; a burn-in would disturb it" in refused
    assert "does not hold n9; it holds n1, n2, n3" in check_without_driver(tmp_path, "n9", "--lineage", "12", code=3)
    assert check_without_driver(tmp_path, "--lineage", "12", code=0).endswith(" - 3 nodes, 0 GPUs\n")


def test_gpus_in_use_are_not_burnt_in(tmp_path: Path, driver: FakeDriver):
    (tmp_path / "opt-ops.toml").write_text("[health]\ngpus_per_node = 2\n")
    driver.set(1, processes="71:1024")
    assert "processes run on the GPUs of " in check(tmp_path, "--burn-in", code=3)


# As srun does: the command once for each task, the tasks told where they are, standard input broadcast to all.
SRUN = """#!{python}
import os, subprocess, sys, threading
options = dict(word[2:].split("=") for word in sys.argv[1:] if word.startswith("--") and "=" in word and word[2] != "x")
at = sys.argv.index("{python}")
tasks = []
for node in options["nodelist"].split(","):
    for local in range(int(options["ntasks-per-node"])):
        where = dict(os.environ, SLURMD_NODENAME=node, SLURM_LOCALID=str(local), SLURM_JOB_ID=options["jobid"])
        tasks.append(subprocess.Popen(sys.argv[at:], env=where, stdin=subprocess.PIPE))
for line in sys.stdin.buffer:
    for task in tasks:
        task.stdin.write(line)
        task.stdin.flush()
for task in tasks:
    task.stdin.close()
    task.wait()
"""


def test_nodes_of_a_slurm_job_are_read_and_burnt_in_by_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for srun: what is tested is what we ask of it, and what becomes of the answers."""
    (tmp_path / "opt-ops.toml").write_text("scheduler = 'slurm'\n")
    asked = ("n1", "n2", "--burn-in", "--seconds", "80", "--drill", "n2:bad-memory", "-o", "json")
    assert "no job holds these nodes" in check_without_driver(tmp_path, *asked[:-2], code=3)
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    n1, n2 = json.loads(check(tmp_path, *asked, code=2))["items"]
    assert (n1["node"], n1["verdict"], n2["node"], n2["reason"]) == ("n1", "healthy", "n2", "burn_in_memory")
    assert [each["node"] for each in sorted(n1["burn_in"]["devices"], key=lambda each: each["node"])] == ["n1", "n2"]
    assert n1["burn_in"]["rounds"][0][0]["gbs"] > 0
