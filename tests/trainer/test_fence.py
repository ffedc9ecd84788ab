"""An attempt that is not the newest any more leaves, and leaves no checkpoint behind."""

import json
import os
import signal
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from opt_ops.contract.checkpoint import commit as committing
from opt_ops.contract.fence import Fence, SupersededError
from tests.trainer.harness import Ranks, finish, settings, start, train, wait_for
from tests.trainer.test_checkpoint import Training
from tests.trainer.test_train import arguments, wait_for_step


def name(path: Path, attempt: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"v": 1, "attempt": attempt}))
    temporary.replace(path)


def fenced(folder: Path, text: Path, *pairs: str) -> list[str | Path]:
    extra = ["--fence", folder / "fence.json", "--attempt", "1.00-a1", *settings(*pairs)]
    return arguments(folder, text, "a1", *extra)


def test_all_ranks_leave_when_a_newer_attempt_is_named(text: Path, tmp_path: Path) -> None:
    name(tmp_path / "fence.json", "1.00-a1")
    ranks = start(2, *fenced(tmp_path, text, "steps=100000", "checkpoint_every=100000"))
    wait_for_step(tmp_path / "a1", 3)
    name(tmp_path / "fence.json", "1.00-a2")
    done = finish(ranks)
    assert [process.returncode for process in done] == [83, 83]
    for process in done:
        assert process.stderr.startswith("error: superseded: a newer attempt exists")
        assert process.stderr.count("\n") == 1
    assert manifest.committed(tmp_path / "checkpoints") == []


def test_sigterm_is_left_to_the_supervisor(text: Path, tmp_path: Path) -> None:
    name(tmp_path / "fence.json", "1.00-a1")
    (rank,) = start(0, *fenced(tmp_path, text, "steps=100000", "checkpoint_every=100000"))
    wait_for_step(tmp_path / "a1", 3)
    rank.send_signal(signal.SIGTERM)  # a scheduler's, to every process of the job
    rank.send_signal(signal.SIGUSR1)  # the supervisor's
    wait_for(lambda: len(manifest.committed(tmp_path / "checkpoints")) == 1, "no checkpoint")
    rank.send_signal(signal.SIGINT)
    (done,) = finish([rank])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "stopped by SIGINT")


def test_training_goes_on_without_the_file(text: Path, tmp_path: Path) -> None:
    (done,) = train(0, *fenced(tmp_path, text, "steps=3"))
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert [step for step, _ in manifest.committed(tmp_path / "checkpoints")] == [3]


def superseded_during_a_save(folder: Path, late: bool) -> list[str]:
    """The newer attempt is named before the save, or when all of it is written but the marker."""
    fence = folder / "fence.json"
    write = committing.write_durably

    def and_then_fence(path: Path, text: str) -> None:
        write(path, text)
        if path.name == manifest.MANIFEST:
            name(fence, "1.00-a2")

    if late:
        committing.write_durably = and_then_fence  # the writer is forked with it
    try:
        training = Training(folder / "checkpoints", 2, 1, fence=Fence(fence, "1.00-a1"))
    finally:
        committing.write_durably = write
    training.step()
    if not late and os.environ["RANK"] == "0":
        name(fence, "1.00-a2")
    try:
        training.save()
        training.checkpointer.wait()
    except SupersededError as error:
        return [str(error)]
    return ["committed"]


@pytest.mark.parametrize("late", [False, True])
def test_no_marker_is_written_once_a_newer_attempt_is_named(ranks: Ranks, tmp_path: Path, late: bool) -> None:
    newer = manifest.step_folder(tmp_path / "checkpoints", 1)
    if not late:
        newer.mkdir(parents=True)
        (newer / "__0_0.distcp").write_text("what the newer attempt is writing")
    name(tmp_path / "fence.json", "1.00-a1")
    outcomes = ranks(2, superseded_during_a_save, tmp_path, late)
    assert all("names 1.00-a2" in outcome[0] for outcome in outcomes), outcomes
    assert manifest.committed(tmp_path / "checkpoints") == []
    assert (newer / "manifest.json").exists() == late
    assert late or (newer / "__0_0.distcp").read_text() == "what the newer attempt is writing"


HELD_BEFORE_THE_MARKER = """
import time
from pathlib import Path
from opt_ops.contract import manifest
from opt_ops.contract.checkpoint import commit as committing

write = committing.write_durably

def and_wait(path, text):
    write(path, text)
    while path.name == manifest.MANIFEST and "step-00000004" in str(path) and Path(__file__).exists():
        time.sleep(0.02)

committing.write_durably = and_wait
"""


def test_superseded_during_the_last_save_ends_all_ranks_with_83(text: Path, tmp_path: Path) -> None:
    name(tmp_path / "fence.json", "1.00-a1")
    path = manifest.step_folder(tmp_path / "checkpoints", 4)
    held = tmp_path / "sitecustomize.py"  # Python runs it at its start: the writer waits before the marker
    held.write_text(HELD_BEFORE_THE_MARKER)
    ranks = start(2, *fenced(tmp_path, text, "steps=4"), "--from-scratch", fresh=[0], PYTHONPATH=str(tmp_path))
    wait_for((path / "manifest.json").exists, "no last save")
    name(tmp_path / "fence.json", "1.00-a2")
    held.unlink()
    assert [process.returncode for process in finish(ranks)] == [83, 83]
    assert (path / "manifest.json").exists()
    assert manifest.committed(tmp_path / "checkpoints") == []
