"""The command ``python -m trainer.kernels check``, and the table of all that it compiles.

`golden.json` is the output of ``python -m trainer.kernels check -o json``. `REWRITE_GOLDEN=1` lets the test put the
rows that it compiled into it.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.harness import REPOSITORY
from trainer.kernels import check
from trainer.kernels.check import Job, Table
from trainer.recipes import PUBLISHED

GOLDEN = Path(__file__).with_name("golden.json")
ARCHITECTURES = (80, 90, 100)


def key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in ("op", "kernel", "source", "recipes", "shape", "dtype", "arch")])


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return {key(row): row for row in json.loads(GOLDEN.read_text())["kernels"]}


def compiled(*asked: tuple[Job, int]) -> Table:
    return check.check(asked, lambda line: None)


def test_the_table_has_every_kernel_and_none_spills(golden: dict[str, dict[str, Any]]) -> None:
    jobs = check.jobs()
    assert {job.op for job in jobs} == {"dropout_add_layer_norm", "cross_entropy", "bias_relu", "adamw"}
    assert {name for job in jobs for name in job.recipes} == set(PUBLISHED)
    wanted = [key(job.row(architecture)) for job in jobs for architecture in ARCHITECTURES]
    assert list(golden) == wanted, "run: python -m trainer.kernels check -o json > tests/kernels/golden.json"
    assert Table(list(golden.values()), []).troubles == []
    for row in golden.values():
        assert row["load_bits"] in (128, None), row
        assert row["store_bits"] in (128, None), row
        assert row["offset_bits"] in (64, None), row


def test_what_is_compiled_here_is_in_the_table(
    golden: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    # The smallest shape of each kernel, and the widest backward pass of the norm, which was the first one to spill.
    first = {(job.op, job.kernel): job for job in reversed(check.jobs())}
    table = compiled(*((job, 90) for job in first.values() if job.op != "adamw" or job.kernel == "adamw_fp32_bf16"))
    assert table.troubles == []
    moved = []
    for row in table.kernels:
        before = golden[key(row)]
        facts = ("stack", "spill_loads", "spill_stores", "load_bits", "store_bits", "mma", "offset_bits")
        assert {name: row[name] for name in facts} == {name: before[name] for name in facts}, row
        moved += [
            f"{row['op']} {row['kernel']} {row['shape']} sm_90: {name} {before[name]} -> {row[name]}"
            for name in ("registers", "shared")
            if row[name] != before[name]
        ]
        golden[key(row)] = row
    if moved:
        with capsys.disabled():
            print("\nkernels that need more or less than in tests/kernels/golden.json:", *moved, sep="\n  ")
    if moved and os.environ.get("REWRITE_GOLDEN"):
        GOLDEN.write_text(Table(list(golden.values()), []).json())


def job(kernel: str) -> Job:
    return next(job for job in check.jobs() if job.op == "dropout_add_layer_norm" and job.kernel == kernel)


def spilling(architecture: int) -> check.MachineCode:
    """The forward kernel with far too wide a row for one warp."""
    from trainer.kernels import compile as machine_code

    it = job("forward").compile.args[0]  # type: ignore[attr-defined]
    return machine_code.compiled(replace(it, num_warps=1, constexprs=it.constexprs | WIDE), architecture)


WIDE = {"WIDTH": 8192, "BLOCK": 8192}


def dies(architecture: int) -> check.MachineCode:
    os._exit(3)


def raises(architecture: int) -> check.MachineCode:
    raise ValueError(f"no such architecture: {architecture}")


def test_what_spills_fails_or_dies_is_named() -> None:
    asked = [(replace(job("forward"), compile=how), 90) for how in (spilling, dies, raises)]
    table = compiled(*asked)
    (spilled,) = table.kernels
    assert spilled["stack"] > 0
    assert spilled["spill_loads"] > 0
    assert spilled["spill_stores"] > 0
    assert [row["error"] for row in table.failed] == [
        "the compiler's process died (status 3)",
        "ValueError: no such architecture: 90",
    ]
    assert len(table.troubles) == 3
    assert json.loads(table.json())["failed"] == table.failed


def test_without_a_compiler_the_command_says_which() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from trainer.kernels.__main__ import main; sys.exit(main(['check']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (78, "")
    assert "pip install triton" in ran.stderr


def test_a_gpu_that_is_too_old_is_refused_before_anything_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.kernels.__main__ import main

    for text in ("70", "sm_70", "7.0"):
        assert main(["check", "--arch", text]) == 78
        assert capsys.readouterr().err == "error: --arch 70: kernels need 75 or newer.\n"
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--arch", "hopper"])
    assert "invalid compute capability value: 'hopper'" in capsys.readouterr().err


def test_the_exit_code_is_1_where_a_kernel_spills(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.kernels.__main__ import main

    row = job("forward").row(90) | dict.fromkeys(("registers", "shared", "stack", "spill_loads", "spill_stores"), 0)
    row |= {"load_bits": 128, "store_bits": 128, "mma": None, "offset_bits": 64}
    for spills, code in ((0, 0), (4, 1)):
        monkeypatch.setattr(check, "check", lambda *_, spills=spills: Table([row | {"spill_stores": spills}], []))
        assert main(["check", "--arch", "90", "-o", "json"]) == code
        said = capsys.readouterr()
        assert json.loads(said.out)["kernels"][0]["spill_stores"] == spills
        assert ("4 stores of spilled values" in said.err) == bool(spills)
    assert main(["check"]) == 1
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["op", "kernel", "shape"]
