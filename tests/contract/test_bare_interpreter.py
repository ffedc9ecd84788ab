"""The contract needs nothing but Python: an interpreter without any installed package imports and uses all of it."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import sys

root, folder = sys.argv[1:]
refused = []


class OnlyTheStandardLibrary:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first in sys.stdlib_module_names or name == "opt_ops" or f"{name}.".startswith("opt_ops.contract."):
            return None
        refused.append(name)
        raise ImportError(f"{name} is not of the standard library")


sys.meta_path.insert(0, OnlyTheStandardLibrary())
sys.path.insert(0, root)

import importlib
import json
import pkgutil
from pathlib import Path

import opt_ops.contract as contract

modules = [each.name for each in pkgutil.walk_packages(contract.__path__, "opt_ops.contract.")]
for name in modules:
    importlib.import_module(name)

folder = Path(folder)
checkpoints = folder / "checkpoints"
options = contract.parse(
    ["--recipe", "mine", "--set", "steps=3", "--run-dir", f"{folder}/a1", "--checkpoint-dir", str(checkpoints)]
    + ["--attempt", "1.00-a1", "--fence", f"{folder}/fence.json", "--from-scratch"]
    + ["--lr-factor", "1:0.5", "--skip-batches", "2:2", "--own", "option"]
)
assert options.supervised and options.settings == {"steps": "3"} and list(options.rest) == ["--own", "option"]
assert contract.starting_point(options, 0) is None
run, outside = contract.RunFolder(options, 0), contract.Outside(options, 0)
schedule = {"kind": "cosine", "peak_lr": 1.0, "warmup_steps": 0, "total_steps": 10}
optimizer = {"betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0}
run.config(steps=3, schedule=schedule, optimizer=optimizer)
run.phase("training", 0)
position = 0
for step in (1, 2, 3):
    agreed = outside.agreed(outside.local(step))
    assert not agreed.superseded and agreed.lr_factor == 1.0
    position = contract.next_sample(position, 8, options.skips) + 8
    assert position == contract.batch_of(step, options.skips) * 8
    line = run.telemetry(
        num_updates=step, loss=float("nan") if step == 2 else 3.0, gnorm=1.0, tokens=8 * step, wps=8.0,
        lr=contract.lr_of(schedule, options.lr_factors, step), step_seconds=0.1, data_position=position, **optimizer,
    )
    run.phase("saving", step)
    path = contract.step_folder(checkpoints, step)
    (path / "optimizer").mkdir(parents=True)
    for name in ("weights", "optimizer/0"):
        (path / name).write_text(f"{name} {step}")
    contract.write_rank(path, 0, ["weights", "optimizer/0"], state=["weights", "optimizer/0"])
    header = {"step": step, "attempt": options.attempt, "ts": 1.0, "layout": {}, "data_position": position}
    header |= {"tokens": 8 * step, "settings_digest": "", "telemetry": line}
    contract.commit(path, ranks=1, deadline_seconds=1, header=header, before_marker=outside.check_fence)
    run.phase("training", step)
lines = [json.loads(text) for text in (folder / "a1/telemetry.jsonl").read_text().splitlines()]
assert [(line["num_updates"], line["finite"]) for line in lines] == [(1, True), (2, False), (3, True)]
assert [step for step, _ in contract.committed(checkpoints)] == [1, 2, 3]
assert contract.verify(path).data_position == position == contract.read(path).data_position
contract.pin(path)
contract.remove(contract.step_folder(checkpoints, 1))
(path / "weights").write_text("other")
try:
    contract.verify(path)
except contract.CheckpointError as error:
    assert contract.exit_code(error) == contract.DAMAGED == 65
else:
    raise AssertionError("a changed file was not found")
assert contract.place_from_environment({}).world == 1
loaded = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__", "__mp_main__"}
print(json.dumps({"modules": modules, "refused": refused, "loaded": sorted(loaded)}))
"""


def used(root: Path, folder: Path) -> dict[str, list[str]]:
    """What the program says of the contract in the folder ``root``."""
    command = [sys.executable, "-S", "-I", "-c", PROGRAM, str(root), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(root: Path) -> set[str]:
    paths = (path.relative_to(root).with_suffix("") for path in (root / "opt_ops/contract").rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return names - {"opt_ops.contract"}


def test_an_interpreter_without_packages_imports_and_uses_all_of_it(tmp_path: Path) -> None:
    found = used(REPOSITORY, tmp_path)
    assert set(found["modules"]) == expected(REPOSITORY)
    assert "opt_ops.contract.checkpoint.commit" in found["modules"]
    assert set(found["refused"]) <= {"org"}, "copy asks for Jython's module org"
    assert found["loaded"] == ["opt_ops"]


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is missing"
)
def test_the_contract_in_a_wheel_needs_none_of_its_dependencies(tmp_path: Path) -> None:
    """What ``pip install --no-deps opt-ops`` puts into a training environment."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=240)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    found = used(tmp_path / "installed", tmp_path)
    assert set(found["modules"]) == expected(REPOSITORY) == expected(tmp_path / "installed")
    assert found["loaded"] == ["opt_ops"]
