"""A disk without room costs lines and checkpoints, never the training."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from opt_ops.contract import manifest
from opt_ops.contract.phases import PhaseFile
from opt_ops.contract.telemetry import LineFile
from tests.trainer.harness import REPOSITORY, finish, settings, start, telemetry, wait_for
from tests.trainer.test_train import arguments, wait_for_step


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here (needs root): {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        while True:
            try:
                file.write(bytes(512))
            except OSError:
                return ballast


def test_lines_are_lost_whole_and_return_when_there_is_room(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = disk / "lines.jsonl"
    lines = LineFile(path)
    value = {"text": "x" * 900}  # the last one before the disk is full will not fit into its page
    assert lines.write({"line": 0} | value)
    ballast = fill(disk)
    outcomes = [lines.write({"line": i} | value) for i in range(1, 20)]
    assert set(outcomes[:3]) == {True}, "what fits into the last page"
    assert set(outcomes[4:]) == {False}
    ballast.unlink()
    assert lines.write({"line": 20} | value)
    content = path.read_text()
    assert content.endswith("\n")
    written = [json.loads(line)["line"] for line in content.splitlines()]
    assert written == [0, *[i for i, done in enumerate(outcomes, start=1) if done], 20]
    told = caplog.messages
    assert len(told) == 2
    assert "cannot be written, training continues: " in told[0]
    assert told[1].endswith(f"can be written again; {outcomes.count(False)} lines were lost")


def test_a_phase_that_was_lost_is_told_at_the_next_occasion(disk: Path) -> None:
    phases = PhaseFile(disk / "phases.jsonl")
    phases.enter("start", None)
    ballast = fill(disk)
    for step in range(200):  # until the last page is full
        phases.enter("training" if step % 2 else "saving", step)
    phases.enter("ending", 200)
    ballast.unlink()
    phases.enter("ending", 200)
    last = json.loads((disk / "phases.jsonl").read_text().splitlines()[-1])
    assert (last["phase"], last["step"]) == ("ending", 200)


def read_until(stream: IO[str] | None, what: str) -> str:
    assert stream is not None
    for line in stream:
        if what in line:
            return line
    raise AssertionError(f"ended without {what!r}")


def test_training_goes_on_while_the_disk_is_full_and_says_what_it_could_not_save(text: Path, disk: Path) -> None:
    endless = settings("steps=100000", "checkpoint_every=100000")
    ranks = start(2, *arguments(disk, text, "a1", *endless), fresh=[0])
    wait_for_step(disk / "a1", 3)
    ranks[0].send_signal(signal.SIGUSR1)
    wait_for(lambda: len(manifest.committed(disk / "checkpoints")) == 1, "no checkpoint while there is room")
    ballast = fill(disk)
    error = ranks[0].stderr
    read_until(error, "telemetry.jsonl cannot be written, training continues: ")
    ranks[0].send_signal(signal.SIGUSR1)
    told = read_until(error, "checkpoint not saved: ")
    assert "No space left on device" in told
    read_until(ranks[0].stdout, "step ")
    ballast.unlink()
    read_until(error, "telemetry.jsonl can be written again; ")
    ranks[0].send_signal(signal.SIGUSR1)
    wait_for(lambda: len(manifest.committed(disk / "checkpoints")) == 2, "no checkpoint now that there is room")
    for process in ranks:
        process.send_signal(signal.SIGTERM)
    finish(ranks)
    lines = telemetry(disk / "a1")  # each of them whole
    steps = [line["num_updates"] for line in lines]
    assert steps == sorted(set(steps))
    assert len(steps) < steps[-1], "no line was lost: the disk was not full"
    phases = [json.loads(line)["phase"] for line in (disk / "a1" / "phases.jsonl").read_text().splitlines()]
    assert phases[-1] == "training"
    for _, path in manifest.committed(disk / "checkpoints"):
        manifest.verify(path)


def test_a_failed_save_stands_in_the_line_that_follows(text: Path, tmp_path: Path) -> None:
    in_the_way = manifest.step_folder(tmp_path / "checkpoints", 4)
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file where a folder must be")
    ranks = start(2, *arguments(tmp_path, text, "a1", *settings("steps=24", "checkpoint_every=4")))
    assert [process.returncode for process in finish(ranks)] == [0, 0]
    told = {line["num_updates"]: line["save_error"] for line in telemetry(tmp_path / "a1") if line["save_error"]}
    ((step, why),) = told.items()
    assert 5 <= step <= 9, "the save of step 8 waits for that of step 4"
    assert why == f"[Errno 20] Not a directory: '{in_the_way}/COMMITTED'"
    assert [step for step, _ in manifest.committed(tmp_path / "checkpoints")] == list(range(8, 25, 4))


def test_a_log_that_cannot_be_written_ends_nothing(text: Path, tmp_path: Path) -> None:
    words = [*map(str, arguments(tmp_path, text, "a1", *settings("steps=5", "log_every=1")))]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trainer", *words], cwd=REPOSITORY, stdout=full, stderr=full, timeout=240
        )
    assert done.returncode == 0
    assert len(telemetry(tmp_path / "a1")) == 5
