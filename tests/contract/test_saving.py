"""A checkpoint that rank 0 writes whole, and how a rank ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.contract import CheckpointError, Options, Outside, committed, save_alone, verify
from tests.contract.test_outside import Silence

LINE = {"num_updates": 5, "data_position": 40, "tokens": 400}


def parts(tmp_path: Path) -> tuple[Options, Outside]:
    fence = tmp_path / "attempt.json"
    fence.write_text(json.dumps({"attempt": "1.00-a1"}))
    options = Options(run_dir=tmp_path / "a1", checkpoint_dir=tmp_path / "c", attempt="1.00-a1", fence=fence,
        lr_factors=((3, 0.5),), skips=((1, 2),))  # fmt: skip
    return options, Outside(options, 0, Silence())


def test_it_verifies_and_replaces_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    options, outside = parts(tmp_path)
    left = tmp_path / "c" / "step-00000005"
    left.mkdir(parents=True)
    (left / "old.bin").write_bytes(b"old")
    assert save_alone(options, outside, LINE, {"w.json": "[1]", "o.bin": b"moments"}, world=2)
    found = verify(left)
    assert (found.step, found.attempt, found.data_position, found.tokens) == (5, "1.00-a1", 40, 400)
    assert (found.layout, found.lr_factors, found.skips) == ({"world": 2}, [[3, 0.5]], [[1, 2]])
    assert {name: file["state"] for name, file in found.files.items()} == {"w.json": True, "o.bin": True}
    with pytest.raises(CheckpointError, match=r"stale|same|equal"):
        save_alone(options, outside, LINE | {"num_updates": 6, "tokens": 480}, {"w.json": "[1]"}, world=2)


def test_it_leaves_the_checkpoints_of_a_newer_attempt_alone(tmp_path: Path) -> None:
    options, outside = parts(tmp_path)
    assert save_alone(options, outside, LINE, {"w.json": "[1]"}, world=1)
    assert options.fence is not None
    options.fence.write_text(json.dumps({"attempt": "1.00-a2"}))
    assert not save_alone(options, outside, LINE, {"w.json": "[2]"}, world=1)
    assert not save_alone(options, outside, LINE | {"num_updates": 6}, {"w.json": "[3]"}, world=1)
    assert [step for step, _ in committed(tmp_path / "c")] == [5]
    assert (tmp_path / "c" / "step-00000005" / "w.json").read_text() == "[1]"
    assert outside.agreed(outside.local(7)).superseded, "all ranks hear of it in the next update"


@pytest.mark.parametrize(
    ("error", "code", "traced"),
    [
        ("contract.UserError('why')", 78, False),
        ("contract.CheckpointError(Path('c'), 'why')", 65, False),
        ("contract.NotFiniteError('why')", 82, False),
        ("contract.SupersededError('why')", 83, False),
        ("contract.place_from_environment({'RANK': '0'})", 78, False),
        ("MemoryError('why')", 84, True),
        ("type('OutOfMemoryError', (RuntimeError,), {})('why')", 84, True),
        ("RuntimeError('[enforce fail] DefaultCPUAllocator: why')", 84, True),
        ("ValueError('why')", 1, True),
    ],
)
def test_a_rank_ends_with_the_code_of_its_error_whatever_its_threads_do(error: str, code: int, traced: bool) -> None:
    program = f"""
import threading
from pathlib import Path
from opt_ops import contract
threading.Thread(target=threading.Event().wait).start()
with contract.leaving_on_faults():
    raise {error}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == traced
    assert done.stderr.splitlines()[-1].startswith("error: ")
