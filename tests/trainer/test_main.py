"""What the command line says before any training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opt_ops.contract import manifest
from opt_ops.contract.fence import SupersededError
from tests.trainer.harness import REPOSITORY, train
from trainer import loop, recipes
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.loop import TrainJob


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ["--set", "optim.peek_lr=1"],
            "--set optim.peek_lr=1: no setting is called 'optim.peek_lr'. Did you mean optim.peak_lr or ",
        ),
        (["--lr-factor", "450"], "--lr-factor 450: expected STEP:FACTOR"),
        (["--fence", "fence.json"], "--fence needs --attempt"),
        (["--lr-factor", "450:0"], "--lr-factor 450:0: expected STEP:FACTOR"),
        (["--skip-batches", "5"], "--skip-batches 5: expected FIRST:LAST, two batch numbers with 1 <= FIRST"),
        (["--skip-batches", "0:5"], "--skip-batches 0:5: expected FIRST:LAST"),
        (["--skip-batches", "6:5"], "--skip-batches 6:5: expected FIRST:LAST"),
        (["--skip-batches", "5:6.5"], "--skip-batches 5:6.5: expected FIRST:LAST"),
    ],
)
def test_a_user_error_is_one_clear_line_and_78(tmp_path: Path, words: list[str], why: str) -> None:
    folders = ["--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "checkpoints"]
    (done,) = train(0, "--recipe", "opt-tiny", *folders, *words)
    assert done.returncode == 78
    assert done.stderr.startswith(f"error: {why}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_signals_are_heeded_before_anything_heavy_is_imported() -> None:
    loaded = "import sys, trainer.__main__; print(*{'torch', 'numpy', 'tokenizers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_run_folder_must_be_named() -> None:
    (done,) = train(0, "--recipe", "opt-tiny")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr == "error: --run-dir is required; --help shows examples.\n"


def test_an_unknown_option_is_a_user_error_too() -> None:
    (done,) = train(0, "--recipe", "opt-tiny", "--resum", "x")
    assert done.returncode == 78
    assert done.stderr == "error: unrecognized arguments: --resum x; --help shows examples.\n"


def test_recipes_can_be_listed() -> None:
    (done,) = train(0, "--list-recipes")
    assert done.returncode == 0
    assert "opt-125m: OPT-125M (arXiv" in done.stdout
    assert "  optim.betas=0.9,0.95\n" in done.stdout


def job(tmp_path: Path, **changes: object) -> TrainJob:
    values = {
        "recipe_name": "opt-tiny",
        "recipe": recipes.build("opt-tiny"),
        "run_dir": tmp_path / "a1",
        "checkpoint_dir": tmp_path / "checkpoints",
        "attempt": "a1",
        "resume": None,
        "from_scratch": False,
        "init_from": None,
        "lr_factors": [],
        "skips": [],
        "data": [],
        "data_since": [],
        "valid": [],
        "tokenizer": None,
        "fence": None,
        "process_start": 0.0,
        "signals": None,
    }
    return TrainJob(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_it_never_starts_over_in_silence(tmp_path: Path) -> None:
    path = manifest.step_folder(tmp_path / "checkpoints", 450)
    path.mkdir(parents=True)
    loop.check_folders(job(tmp_path))
    (path / "COMMITTED").touch()
    with pytest.raises(UserError, match=f"holds a checkpoint of step 450: continue with --resume {path}, or"):
        loop.check_folders(job(tmp_path))
    loop.check_folders(job(tmp_path, from_scratch=True))
    loop.check_folders(job(tmp_path, resume=path))


def test_an_attempt_does_not_write_into_anothers_telemetry(tmp_path: Path) -> None:
    (tmp_path / "a1").mkdir()
    (tmp_path / "a1" / "telemetry.jsonl").touch()
    with pytest.raises(UserError, match="a --run-dir of its own"):
        loop.check_folders(job(tmp_path))


def test_out_of_memory_has_a_code_and_says_what_to_change(tmp_path: Path) -> None:
    folders = ["--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "checkpoints"]
    huge = ["--set", f"model.max_positions={2**40}"]  # a table of 500 TB
    (done,) = train(0, "--recipe", "opt-tiny", *folders, *huge)
    assert done.returncode == 84
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: out of memory; the traceback above says where. Lower data.mic"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 84),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 84),
        (RuntimeError("Connection closed by peer"), 1),
        (SupersededError("superseded"), 83),
    ],
)
def test_how_it_ends_is_told_by_the_exit_code(monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["trainer"])
    monkeypatch.setattr("trainer.__main__._train", fail)
    assert main(None) == code  # pyright: ignore[reportArgumentType]
