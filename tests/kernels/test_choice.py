"""When an op runs as a kernel. The records here are made up: none of them is of a GPU."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.kernels.harness import REPOSITORY
from trainer.kernels import records
from trainer.kernels.__main__ import main
from trainer.kernels.choice import OPS, choose
from trainer.kernels.records import Record


def record(op: str, **changed: object) -> Record:
    made_up = Record(
        op=op,
        architecture=90,
        dtype="bf16",
        date="2026-12-01",
        torch="2.13.0",
        triton="3.7.1",
        sha256=records.sha256(op),
        passed=True,
        worst_error=1e-3,
        ratio={"1.3b": 1.2, "6.7b": 1.0},
    )
    return replace(made_up, **changed)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.json"
    path.write_text("[]\n")
    records.write([record(op) for op in OPS], path)
    return path


def test_an_op_with_a_good_record_runs_as_a_kernel(file: Path) -> None:
    ops = choose("auto", 90, torch.bfloat16, file)
    assert dict(ops.ran) == dict.fromkeys(OPS, "fused")
    assert ops.bias_relu is OPS["bias_relu"].fused
    for architecture, dtype, reason in (
        (100, torch.bfloat16, "no record of a test in bf16 on sm_100"),
        (90, torch.float16, "no record of a test in fp16 on sm_90"),
        (70, torch.bfloat16, "kernels need sm_75 or newer, and the GPU is sm_70"),
        (None, torch.bfloat16, "kernels are for GPUs"),
    ):
        ops = choose("auto", architecture, dtype, file)
        assert dict(ops.ran) == dict.fromkeys(OPS, f"reference: {reason}")
        assert ops.bias_relu is OPS["bias_relu"].reference


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sha256": "0" * 64}, "its files have changed since the test of 2026-12-01 on sm_90"),
        ({"passed": False, "worst_error": 0.5}, "it failed the test of 2026-12-01 on sm_90 (error 5.0e-01)"),
        (
            {"ratio": {"1.3b": 1.2, "6.7b": 0.99}},
            "in the test of 2026-12-01 on sm_90 it had 0.99 times the speed of the compiled reference at 6.7b",
        ),
        ({"ratio": {"6.7b": 1.2}}, "in the test of 2026-12-01 on sm_90 it was not timed at 1.3b"),
        (
            {"ratio": {"1.3b": float("nan"), "6.7b": 1.2}},
            "in the test of 2026-12-01 on sm_90 it had nan times the speed of the compiled reference at 1.3b",
        ),
    ],
)
def test_a_record_that_is_not_good_turns_its_op_off(file: Path, changed: dict[str, object], reason: str) -> None:
    records.write([record("bias_relu", **changed)], file)
    ran = choose("auto", 90, torch.bfloat16, file).ran
    assert ran["bias_relu"] == f"reference: {reason}"
    assert {how for op, how in ran.items() if op != "bias_relu"} == {"fused"}


def test_on_and_off_need_no_record(tmp_path: Path) -> None:
    none = tmp_path / "none.json"
    assert set(choose("on", 90, torch.bfloat16, none).ran.values()) == {"fused"}
    assert set(choose("off", 90, torch.bfloat16, none).ran.values()) == {"reference: kernels=off"}


def test_the_repository_claims_nothing_that_no_gpu_has_shown() -> None:
    for it in records.read():
        assert it.op in OPS
        assert len(it.sha256) == 64


def test_an_edit_of_an_ops_file_turns_it_off(file: Path, tmp_path: Path) -> None:
    for package in ("trainer", "opt_ops"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    kernels = tmp_path / "trainer" / "kernels"
    shutil.copy(file, kernels / "records.json")
    for edited in ("bias_relu.py", "adamw.cu"):
        with (kernels / edited).open("a") as source:
            source.write("\n")
    ask = "print(json.dumps(choose('auto', 90, torch.bfloat16).ran))"
    code = f"import json, torch; from trainer.kernels.choice import choose; {ask}"
    asked = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    off = "reference: its files have changed since the test of 2026-12-01 on sm_90"
    assert json.loads(asked.stdout) == dict.fromkeys(OPS, "fused") | {"bias_relu": off, "adamw": off}


def test_a_newer_record_takes_the_place_of_the_older_one(file: Path) -> None:
    newer = record("bias_relu", date="2027-01-01")
    records.write([newer, record("bias_relu", architecture=100)], file)
    found = records.read(file)
    assert len(found) == len(OPS) + 1
    assert [it for it in found if it.op == "bias_relu"] == [newer, record("bias_relu", architecture=100)]
    assert len(file.read_text().splitlines()) == len(found) + 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for text in ("[", '[{"op": "bias_relu"}]'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"records\.json does not hold records of kernels"):
            records.read(path)


def test_the_command_keeps_records_and_says_which_are_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, measured = tmp_path / "kept.json", tmp_path / "measured.json"
    kept.write_text("[]\n")
    for name in ("write", "refusal"):
        function = getattr(records, name)
        monkeypatch.setattr(records, name, lambda *args, function=function: function(*args, kept))
    made_up = [record("bias_relu"), record("adamw", passed=False)]
    measured.write_text(json.dumps([asdict(it) for it in made_up]))
    assert main(["record", str(measured)]) == 0
    assert sorted(records.read(kept), key=lambda it: it.op) == made_up[::-1]
    good, failed = capsys.readouterr().out.splitlines()
    assert good == "bias_relu bf16 sm_90: kernels=auto uses it"
    assert failed.startswith("adamw bf16 sm_90: it failed the test of 2026-12-01")
    measured.write_text('[{"op": "adamw"}]')
    assert main(["record", str(measured)]) == 78
    assert "does not hold records of ops" in capsys.readouterr().err
