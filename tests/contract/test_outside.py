"""What one rank hears, all ranks do, in the same update."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from opt_ops.contract import Agreed, Options, Outside, UserError
from opt_ops.contract.signals import Signals

PROGRAM = """
import json, os, signal, sys, time
from opt_ops.contract import Options, Outside, SupersededError, UserError
from pathlib import Path
folder = Path(sys.argv[1])
fence = folder / "fence.json"
options = Options(run_dir=folder, checkpoint_dir=folder, attempt="1.00-a1", fence=fence)
first = Outside(options, 0)
second = Outside(options, 1, first.signals)
def both(step):
    return first.agreed([a + b for a, b in zip(first.local(step), second.local(step))])
fence.write_text(json.dumps({"attempt": "1.00-a1"}))
print(both(1))
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR1)
first.signals.save_requested.wait(240)
print(both(2).save, both(3).save)
(folder / "drill.json").write_text(json.dumps([
    {"id": "a", "kind": "lr", "from_step": 5, "updates": 2, "factor": 50},
    {"id": "b", "kind": "nan", "from_step": 6}, {"id": "c", "kind": "flip-bit", "from_step": 7, "rank": 1}]))
for step in (4, 5, 6, 7):
    agreed = both(step)
    print(agreed.lr_factor, agreed.nan, agreed.flip)
(folder / "drill.json").write_text("{")
try:
    both(8)
except UserError as error:
    print("drill.json is not a list" in str(error))
(folder / "drill.json").unlink()
fence.write_text(json.dumps({"attempt": "1.00-a2"}))
time.sleep(1.1)
print(both(9).superseded)
try:
    first.check_fence()
except SupersededError:
    print("superseded")
"""


def test_outside(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == [
        "Agreed(save=False, superseded=False, lr_factor=1.0, nan=False, flip=None, kill=None)",
        "True False",
        "1.0 False None",
        "50.0 False None",
        "50.0 True None",
        "1.0 False 1",
        "True",
        "True",
        "superseded",
    ], done.stderr


class Silence(Signals):
    """Signals of a rank that is no process of its own."""

    def __init__(self) -> None:
        self.save_requested = threading.Event()

    def leave_sigterm_to_supervisor(self) -> None: ...

    def dump_stacks_to(self, path: Path) -> None: ...


def rank(number: int, **options: object) -> Outside:
    return Outside(Options(**options), number, Silence())  # pyright: ignore[reportArgumentType]


def summed(*numbers: list[float]) -> list[float]:
    return [sum(each) for each in zip(*numbers, strict=True)]


def test_a_request_that_comes_between_local_and_agreed_is_not_lost() -> None:
    first, second = rank(0), rank(1)
    sums = summed(first.local(1), second.local(1))
    second.signals.save_requested.set()
    assert [first.agreed(sums).save, second.agreed(sums).save] == [False, False]
    sums = summed(first.local(2), second.local(2))
    first.signals.save_requested.set()  # the save after this update is later than this request, so it answers it
    assert [first.agreed(sums).save, second.agreed(sums).save] == [True, True]
    assert not first.agreed(summed(first.local(3), second.local(3))).save


def test_nobody_needs_a_folder() -> None:
    assert rank(0).agreed(rank(0).local(1)) == Agreed()
    assert not rank(0).spoils(1)


def test_the_fence_is_read_without_a_folder_by_rank_0_only(tmp_path: Path) -> None:
    fence = tmp_path / "attempt.json"
    fence.write_text('{"attempt": "1.00-a2"}')
    first, second = (rank(number, fence=fence, attempt="1.00-a1") for number in (0, 1))
    assert (first.local(1)[1], second.local(1)[1]) == (1.0, 0.0)
    assert first.agreed(first.local(1)).superseded


@pytest.mark.parametrize("kind", ["list", "numpy float32", "torch float32", "torch float64"])
def test_sums_may_be_a_list_an_array_or_a_tensor(tmp_path: Path, kind: str) -> None:
    """Ranks and counts are exact in float32: a job has less than 2**24 ranks."""
    last = 2**20 - 1
    (tmp_path / "drill.json").write_text(
        json.dumps([
            {"id": "f", "kind": "flip-bit", "from_step": 1, "rank": last},
            {"id": "l", "kind": "lr", "from_step": 1, "updates": 1, "factor": 40},
            {"id": "n", "kind": "nan", "from_step": 1},
            {"id": "k", "kind": "kill-rank", "from_step": 1, "rank": last, "in_step": "confirm"},
        ])
    )  # fmt: skip
    first = rank(0, run_dir=tmp_path)
    assert first.spoils(1)
    numbers = first.local(1)
    assert first.spoils(1), "asked after the reduction's numbers, it answers the same"
    numbers[0] = last  # all other ranks ask for a save
    package, _, name = kind.partition(" ")
    sums = numbers
    if package == "numpy":
        sums = np.array(numbers, dtype=name)
    elif package == "torch":
        torch = pytest.importorskip("torch")
        sums = torch.tensor(numbers, dtype=getattr(torch, name))
    agreed = first.agreed(sums)
    assert agreed == Agreed(save=True, lr_factor=40.0, nan=True, flip=last, kill=(last, "confirm"))
    assert [type(value) for value in (agreed.save, agreed.lr_factor, agreed.nan, agreed.flip)] == [
        bool,
        float,
        bool,
        int,
    ]


@pytest.mark.parametrize(
    ("sums", "said"),
    [
        (rank(1).local(1), "the numbers of rank 0 are missing"),
        ([number / 4 for number in rank(0).local(1)], "became 0.25: sum the numbers of all ranks once"),
        ([number * 2 for number in rank(0).local(1)], "became 2: sum"),
        (rank(0).local(1)[1:], "there are 6 numbers, not 7"),
    ],
)
def test_a_reduction_that_does_not_sum_is_an_error(sums: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rank(1).agreed(sums)


def test_drills_that_cannot_be_read_end_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "drill.json").mkdir()
    first, second = (rank(number, run_dir=tmp_path) for number in (0, 1))
    assert not first.spoils(1)
    sums = summed(first.local(1), second.local(1))
    with pytest.raises(UserError, match="not a regular file"):
        first.agreed(sums)
    with pytest.raises(UserError, match="The log of rank 0 has the reason"):
        second.agreed(sums)


def test_a_thread_cannot_handle_signals() -> None:
    found: list[RuntimeError] = []

    def create() -> None:
        try:
            Outside(Options(), 0)
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    thread.join()
    assert "on its main thread only" in str(found[0])
