"""A light base: what the commands need, what they say when an extra is missing, and when another `trainer` is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "mlflow", "matplotlib", "numpy", "apprise", "fairscale", "safetensors", "tokenizers", "fsspec")

# Python imports this file at its start, in every process of a command.
BLOCKER = """
import os, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["MISSING"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder where commands run without the extras."""
    site = tmp_path / "blocker"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER)
    return tmp_path


def opt_ops(folder: Path, *arguments: str, missing: tuple[str, ...] = HEAVY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "blocker"), "MISSING": ",".join(missing)}
    command = [sys.executable, "-m", "opt_ops", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "module", ["opt_ops.cli", "opt_ops.supervise.daemon", "opt_ops.node.agent", "opt_ops.node.nvml"]
)
def test_daemon_agent_and_commands_import_no_extra(module: str):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said", "extra"),
    [
        (["mlflow", "sync"], "MLflow is not installed", "pip install 'opt-ops[mlflow]'"),
        (["mlflow", "open"], "MLflow is not installed", "pip install 'opt-ops[mlflow]'"),
        (
            ["run", "start", "opt-tiny"],
            f"torch is not installed for {sys.executable}",
            "pip install 'opt-ops[trainer]'",
        ),
        (
            ["node", "check", "--burn-in"],
            f"torch is not installed for {sys.executable}",
            "pip install 'opt-ops[trainer]'",
        ),
        (["replay", "--plot", "x.svg"], "--plot needs matplotlib, which is not installed", "pip install matplotlib"),
    ],
)
def test_a_command_names_the_extra_that_it_needs(bare: Path, arguments: list[str], said: str, extra: str):
    done = opt_ops(bare, *arguments)
    if arguments[0] == "node":  # a monitor reads its first line and its own exit codes
        assert (done.returncode, done.stdout.startswith("UNKNOWN - "), said in done.stdout) == (3, True, True)
        assert extra in done.stderr
    else:
        assert (done.returncode, done.stdout) == (75, "")
        assert said in done.stderr.splitlines()[0]
        assert extra in done.stderr.splitlines()[1]
    assert not (bare / "runs").exists(), "no nodes are requested for what cannot start"


def test_another_trainer_needs_no_torch_on_this_machine(bare: Path):
    (bare / "opt-ops.toml").write_text("[trainer]\ncommand = ['./train.sh']\n")
    assert opt_ops(bare, "run", "start", "opt-tiny", "--dry-run").returncode == 0
    (bare / "opt-ops.toml").write_text("[trainer]\ncommand = ['container-of-the-nodes', 'python', '-m', 'trainer']\n")
    assert opt_ops(bare, "run", "start", "opt-tiny", "--dry-run").returncode == 0, "it cannot be known here"


def test_doctor_names_what_is_missing(bare: Path):
    def found() -> dict[str, dict[str, str]]:
        return {row["check"]: row for row in json.loads(opt_ops(bare, "doctor", "-o", "json").stdout)["items"]}

    (bare / "opt-ops.toml").write_text("[alerts]\nurls = ['slack://token']\n")
    rows = found()
    assert (rows["trainer"]["ok"], rows["mlflow"]["ok"], rows["alerts"]["ok"]) == (False, True, False)
    assert "torch is not installed" in rows["trainer"]["found"]
    assert "opt-ops[trainer]" in rows["trainer"]["next"]
    assert rows["mlflow"]["found"] == "not installed: lineages are not mirrored"
    assert (rows["alerts"]["found"], rows["alerts"]["next"]) == (
        "slack://… needs apprise",
        "pip install 'opt-ops[alerts]'",
    )
    assert rows["harness"]["ok"], "nothing asks for it"
    assert "torch is not installed" in rows["harness"]["found"]
    assert rows["serve python"]["ok"], "nothing asks for it"
    assert "torch" in rows["serve python"]["found"]
    assert "serve vllm" not in rows
    (bare / "opt-ops.toml").write_text(
        "[evaluate]\ntasks = ['piqa']\n[serve]\npython = 'no/python'\nvllm = 'no/vllm'\n[mlflow]\ntracking_uri = 'http://mlflow.example'\n"
    )
    rows = found()
    assert not rows["harness"]["ok"]
    assert "opt-ops[evaluate]" in rows["harness"]["next"]
    assert (rows["serve python"]["ok"], rows["serve vllm"]["ok"]) == (False, False)
    assert "make serve-env" in rows["serve python"]["next"]
    assert not rows["mlflow"]["ok"], "the site asks for a server"
    for text, why in (
        ("[evaluate]\nevery = 100\n", "tasks is empty"),
        ("[shape]\nspares = 0\n[evaluate]\nevery = 100\ntasks = ['piqa']\n", "[shape] spares is 0"),
        ("[evaluate]\npython = 'no/python'\n", "No such file"),
    ):
        (bare / "opt-ops.toml").write_text(text)
        row = found()["harness"]
        assert (row["ok"], why in row["found"]) == (False, True), row


def test_the_daemon_watches_without_mlflow_and_says_so_once(bare: Path):
    done = opt_ops(bare, "daemon", "run", "--until-idle")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow is not installed, so lineages are not mirrored") == 1


@pytest.mark.parametrize("owned", [True, False])
def test_a_foreign_trainer_is_named_before_nodes_are_held(tmp_path: Path, owned: bool):
    place = tmp_path / "elsewhere" / "trainer"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    source = "no distribution owns it"
    if owned:
        info = place.parent / "trainer-0.0.36.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trainer\nVersion: 0.0.36\n")
        (info / "RECORD").write_text("trainer/__init__.py,,\ntrainer-0.0.36.dist-info/METADATA,,\n")
        source = "distribution trainer 0.0.36"
    environment = {**os.environ, "PYTHONPATH": str(place.parent)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "opt_ops", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    started = run("run", "start", "opt-tiny")
    assert started.returncode == 75
    said = f"`python -m trainer` starts {place}/__init__.py ({source}), not the trainer of opt-ops"
    assert said in started.stderr
    assert ("pip uninstall trainer" if owned else "rename it") in started.stderr
    assert not (tmp_path / "runs").exists()
    checked = run("doctor", "-o", "json")
    (row,) = (row for row in json.loads(checked.stdout)["items"] if row["check"] == "trainer")
    assert (row["ok"], row["found"]) == (False, said)


def test_a_foreign_package_called_playbooks_changes_nothing(tmp_path: Path):
    (tmp_path / "playbooks").mkdir()
    (tmp_path / "playbooks" / "__init__.py").write_text("raise RuntimeError('never imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "opt_ops", "playbook", "list", "-o", "json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    paths = {Path(row["path"]).parent for row in json.loads(done.stdout)["items"]}
    assert paths == {ROOT / "playbooks"}
