"""Conversions of checkpoints: made once, kept while somebody uses them, and never left in pieces."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.conversions import KEPT, converted
from opt_ops.cli.shared.options import Lineage
from opt_ops.config import TrainerCommand
from opt_ops.contract.manifest import digest
from opt_ops.core.values import Checkpoint
from opt_ops.errors import OptOpsError
from tests.core.story import Story

HOLDER = "import sys; from tests.cli.test_conversions import hold; hold(*sys.argv[1:])"
"""A process that gets a conversion, says so, and keeps it until its stdin is closed."""


def trainer_in(folder: Path, converts: str = 'mkdir "$4"; touch "$4/config.json"') -> TrainerCommand:
    """A program in place of `python -m trainer.convert SRC DST …` that notes each call."""
    program = folder / "python"
    if not program.exists():
        program.write_text(f'#!/bin/sh\necho x >> "{folder}/calls"\n{converts}\n')
        program.chmod(0o755)
    return TrainerCommand(command=[str(program), "-m", "trainer"])


def named(folder: Path, step: int) -> Named:
    checkpoint = folder / f"step-{step:08d}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "COMMITTED").write_text(sha256(f"{step}".encode()).hexdigest())
    story = Story()
    story.begin()
    lineage = Lineage(path=folder, state=story.state)
    return Named(lineage=lineage, checkpoint=Checkpoint(run="1.00", step=step, path=str(checkpoint)), counts=True)


def hold(folder: str, step: str) -> None:
    print(converted(named(Path(folder), int(step)), trainer_in(Path(folder)), "fp32", print).name, flush=True)
    sys.stdin.read()


def holder(folder: Path, step: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-W", "always", "-c", HOLDER, str(folder), str(step)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def conversions(folder: Path) -> set[str]:
    return {each.name for each in (folder / "converted").iterdir() if each.is_dir()}


def test_the_same_bytes_are_converted_once(tmp_path: Path):
    first = converted(named(tmp_path, 10), trainer_in(tmp_path), "fp32", print)
    assert first == converted(named(tmp_path, 10), trainer_in(tmp_path), "fp32", print)
    assert first.name == f"{digest(tmp_path / 'step-00000010')[:16]}-fp32"
    assert (tmp_path / "calls").read_text().count("x") == 1


def test_two_commands_at_once_convert_once(tmp_path: Path):
    trainer_in(tmp_path, 'sleep 0.5; mkdir "$4"')
    both = [holder(tmp_path, 10), holder(tmp_path, 10)]
    said = [each.communicate("") for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert said[0][0].splitlines()[-1] == said[1][0].splitlines()[-1]
    assert not any("unclosed" in errors for _, errors in said)
    assert (tmp_path / "calls").read_text().count("x") == 1


def test_the_pieces_of_a_killed_command_are_removed(tmp_path: Path):
    chosen = named(tmp_path, 10)
    for piece in (f".{chosen.digest[:16]}-fp32.77.tmp", f".{named(tmp_path, 20).digest[:16]}-fp16.78.tmp"):
        (tmp_path / "converted" / piece).mkdir(parents=True)
    (tmp_path / "converted" / f".{named(tmp_path, 20).digest[:16]}-fp16.lock").touch()
    whole = converted(chosen, trainer_in(tmp_path), "fp32", print)
    assert conversions(tmp_path) == {whole.name}


def test_the_last_used_stay_and_what_a_process_has_got_is_never_removed(tmp_path: Path):
    used = holder(tmp_path, 10)
    assert used.stdout is not None
    kept = used.stdout.readline().strip()
    try:
        for step in (20, 30, 40):
            ends = holder(tmp_path, step)
            ends.communicate("")
            lock = tmp_path / "converted" / f".{named(tmp_path, step).digest[:16]}-fp32.lock"
            os.utime(lock, (step, step))  # the clock of a file system may be coarse
            os.utime(tmp_path / "converted" / f".{kept}.lock", (1, 1))
        assert kept in conversions(tmp_path), "it is the oldest, but in use"
        assert len(conversions(tmp_path)) == KEPT + 1
    finally:
        used.communicate("")
    holder(tmp_path, 50).communicate("")
    assert kept not in conversions(tmp_path)


def test_a_failure_is_told_and_leaves_nothing(tmp_path: Path):
    broken = trainer_in(tmp_path, "echo 'error: no heads' >&2; exit 3")
    with pytest.raises(OptOpsError, match="was not converted"):
        converted(named(tmp_path, 10), broken, "fp32", print)
    assert conversions(tmp_path) == set()
    (tmp_path / "python").unlink()
    assert converted(named(tmp_path, 10), trainer_in(tmp_path), "fp32", print).is_dir()
