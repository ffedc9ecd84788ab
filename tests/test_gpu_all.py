"""``benchmarks/gpu_all.sh`` works here in rehearsal: it writes a row for each part, whatever becomes of the part."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
        timeout=300,
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


def test_a_rehearsal_writes_a_row_and_the_numbers_of_each_part(tmp_path: Path) -> None:
    done = gpu_all("--rehearse", "--only", "start saves attention", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    rows = (tmp_path / "rows.md").read_text()
    assert "A rehearsal with tiny models. The numbers mean nothing." in rows
    first, saves, second = [line for line in rows.splitlines() if re.match(r"\| \d", line)]
    assert first.startswith("| 1 | does the trainer start, and agree with Hugging Face? | loss eager ")
    assert second.startswith("| 7 | attention by kernel and head size, forward and backward | 64, the CPU's: ")
    assert "resumed steps equal to the last bit" in saves
    start, *_ = map(json.loads, (tmp_path / "details.jsonl").read_text().splitlines())
    found = start["details"]
    assert found["evaluated"] == found["hugging_face"] or abs(found["evaluated"] - found["hugging_face"]) < 1e-4


def test_a_part_that_fails_or_does_not_end_costs_its_own_row_only(tmp_path: Path) -> None:
    # The interpreter of this test answers for three parts: one hangs, one fails, one is killed.
    fake = tmp_path / "python3"
    fake.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*" head "*) exec {sys.executable} "$@" ;;\n'
        "*gpu_parts\\ start*) exec sleep 100 ;;\n"
        '*gpu_parts\\ tests*) echo "no such package: triton" >&2; exit 1 ;;\n'
        "*) kill -9 $$ ;;\n"
        "esac\n"
    )
    fake.chmod(0o755)
    script = tmp_path / "benchmarks" / "gpu_all.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text().replace("1 40 start", "1 1 start"))
    done = gpu_all(
        "--rehearse",
        "--only",
        "start tests ops",
        str(tmp_path),
        script=script,
        PYTHON=str(fake),
        PYTHONPATH=str(REPOSITORY),
    )
    assert done.returncode == 0, done.stderr
    first, second, third = (tmp_path / "rows.md").read_text().splitlines()[-3:]
    assert first == "| 1 | start | not measured: more than 1 s | 1 |"
    assert second == "| 2 | tests | failed (1): no such package: triton | |"
    assert third == "| 3 | ops | ended by signal 9: no memory, or more than 60 s | |"


def test_without_a_gpu_and_without_a_rehearsal_each_row_says_so(tmp_path: Path) -> None:
    done = gpu_all("--only", "attention", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0
    assert "no GPU is here: only --rehearse works" in (tmp_path / "rows.md").read_text()
