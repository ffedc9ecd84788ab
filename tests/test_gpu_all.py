"""``benchmarks/gpu_all.sh`` works here in rehearsal: it writes a row for each part, whatever becomes of the part."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "gpu_all.sh"


def gpu_all(*arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["sh", str(script), *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def parts() -> list[tuple[str, int, str]]:
    found = re.findall(r"^(\d+) (\d+) (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    return [(number, int(limit), name) for number, limit, name in found]


def test_it_has_a_help() -> None:
    done = gpu_all("--help")
    assert done.returncode == 0
    assert "gpu_all.sh [--rehearse]" in done.stdout
    assert "set -u" not in done.stdout
    assert gpu_all("--hlep").returncode == 64


def test_the_limits_of_all_parts_leave_room_in_nine_minutes() -> None:
    from benchmarks.gpu_parts import PARTS

    assert [name for _, _, name in parts()] == list(PARTS)
    assert sum(limit for _, limit, _ in parts()) <= 9 * 60


@pytest.mark.parametrize("only", ["busy", pytest.param("saves busy", marks=pytest.mark.soak)])
def test_a_rehearsal_writes_a_row_and_the_numbers_of_each_part(tmp_path: Path, only: str) -> None:
    done = gpu_all("--rehearse", "--only", only, str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    rows = (tmp_path / "rows.md").read_text()
    assert "A rehearsal with tiny models. The numbers mean nothing." in rows
    *before, last = [line for line in rows.splitlines() if re.match(r"\| \d", line)]
    assert len(before) == only.count(" ")
    for saves in before:
        assert saves.startswith(
            "| 7 | stall of a save, strangers on the GPU, a resume to the last bit | longest stall "
        )
        assert "resumed steps equal to the last bit" in saves
    assert last.startswith("| 10 | are the busy times of a rank plausible? | ")
    *_, busy = map(json.loads, (tmp_path / "details.jsonl").read_text().splitlines())
    of_layers, forward, _ = busy["details"]["waiting"]
    assert 0 < of_layers <= forward - 4, "two waits of two milliseconds are not the work of the layers"


def test_ligers_kernel_is_timed_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks import gpu_ops

    if find_spec("liger_kernel"):
        pytest.skip("the real one is installed here")
    sets = (gpu_ops.INPUTS["cross_entropy"](8, 64, torch.float32),)
    assert gpu_ops._liger("cross_entropy", sets) == "not installed"
    module = tmp_path / "liger_kernel" / "transformers" / "functional.py"  # stands for the package
    module.parent.mkdir(parents=True)
    module.write_text("from torch.nn.functional import cross_entropy as liger_cross_entropy\n")
    monkeypatch.syspath_prepend(tmp_path)
    seconds = gpu_ops._liger("cross_entropy", sets)
    assert isinstance(seconds, float)
    norms = (gpu_ops.INPUTS["dropout_add_layer_norm"](8, 64, torch.float32),)
    assert "cannot import name 'liger_layer_norm'" in str(gpu_ops._liger("dropout_add_layer_norm", norms))
    assert gpu_ops._liger("bias_relu", ()) == "has none"
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


def test_a_part_that_fails_or_does_not_end_costs_its_own_row_only(tmp_path: Path) -> None:
    # The interpreter of this test answers for three parts: one hangs, one fails, one is killed. The fourth is real.
    fake = tmp_path / "python3"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*" head "*|*gpu_parts\\ attention*) exec {sys.executable} "$@" ;;\n'
        "*gpu_parts\\ start*) exec sleep 100 ;;\n"
        '*gpu_parts\\ tests*) echo "no such package: triton" >&2; exit 1 ;;\n'
        "*) kill -9 $$ ;;\n"
        "esac\n"
    )
    fake.chmod(0o755)
    script = tmp_path / "benchmarks" / "gpu_all.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text().replace("1 35 start", "1 1 start"))
    done = gpu_all(
        "--only",
        "start tests ops attention",
        str(tmp_path),
        script=script,
        PYTHON=str(fake),
        PYTHONPATH=str(REPOSITORY),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    first, second, third, fourth = (tmp_path / "rows.md").read_text().splitlines()[-4:]
    assert first == "| 1 | start | not measured: more than 1 s | 1 |"
    assert second == "| 2 | tests | failed (1): no such package: triton | |"
    assert third == "| 3 | ops | ended by signal 9: no memory, or more than 55 s | |"
    assert "no GPU is here: only --rehearse works" in fourth, "without a GPU nothing is measured"
