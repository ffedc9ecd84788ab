"""The options of a supervised trainer, in a script that may have options of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.contract import UserError, parse

BOTH = ("--run-dir", "r/a1", "--checkpoint-dir", "c")


def test_all_options() -> None:
    options = parse([*BOTH, "--recipe", "x", "--set", "a=1", "--set", "b=c=d", "--set", "a=2", "--attempt", "1.00-a1",
        "--fence", "f", "--resume", "step-1", "--init-from", "w", "--lr-factor", "10:0.5", "--lr-factor", "20:0.5",
        "--skip-batches", "3:4", "--data", "d", "--valid", "v", "--tokenizer", "t", "--snapshot-dir", "s",
        "--checkpoint-copy", "u"])  # fmt: skip
    assert options.supervised
    assert (options.run_dir, options.checkpoint_dir) == (Path("r/a1"), Path("c"))
    assert options.settings == {"a": "2", "b": "c=d"}
    assert (options.attempt, options.fence, options.resume) == ("1.00-a1", Path("f"), Path("step-1"))
    assert options.lr_factors == ((10, 0.5), (20, 0.5))
    assert options.skips == ((3, 4),)
    assert (options.data, options.valid, options.tokenizer) == (("d",), ("v",), Path("t"))
    assert (options.init_from, options.snapshot_dir, options.checkpoint_copy) == (Path("w"), Path("s"), "u")
    assert options.rest == []


def test_what_belongs_to_the_script_is_left_to_it() -> None:
    options = parse(["--lr", "3", *BOTH, "--set=a=1", "pos", "--flag", "--recip", "no"])
    assert options.rest == ["--lr", "3", "pos", "--flag", "--recip", "no"]
    assert options.recipe is None
    assert options.attempt == "a1"


def test_without_a_run_dir_a_script_keeps_its_options() -> None:
    words = ["--resume", "last", "--data", "a", "--checkpoint-dir", "out", "--lr-factor", "0.5", "--set", "n=1"]
    options = parse(words)
    assert not options.supervised
    assert options.settings == {"n": "1"}
    assert options.rest == words[:-2]
    assert (options.resume, options.data, options.lr_factors) == (None, (), ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fence", "f"], "--run-dir is missing"),
        (["--attempt", "1.00-a1"], "--run-dir is missing"),
        (["--run-dir", "r"], "--checkpoint-dir is missing"),
        (["--run-dir", "", "--checkpoint-dir", "c"], "--run-dir is missing"),
        (["--run-dir", "r", "--checkpoint-dir", ""], "--checkpoint-dir is missing"),
        ([*BOTH, "--resume", "x", "--from-scratch"], "exclude each other"),
        ([*BOTH, "--fence", "f"], "--fence needs --attempt"),
        ([*BOTH, "--lr-factor", "10:0"], "--lr-factor 10:0: expected STEP:FACTOR"),
        ([*BOTH, "--lr-factor", "10:nan"], "expected STEP:FACTOR"),
        ([*BOTH, "--skip-batches", "5:4"], "--skip-batches 5:4: expected FIRST:LAST"),
        ([*BOTH, "--set", "steps"], "--set steps: expected KEY=VALUE"),
        ([*BOTH, "--set", "=3"], "expected KEY=VALUE"),
        ([*BOTH, "--resume"], "--resume: expected one argument"),
    ],
)
def test_bad_values_leave_with_78(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(words)
    assert left.value.code == 78
    assert said in capsys.readouterr().err


def test_of_an_option_given_twice_the_last_one_counts() -> None:
    options = parse([*BOTH, "--resume", "a", "--resume", "b", "--run-dir", "r/a2", "--set", "x.y=1", "--set", "x.y=2"])
    assert (options.resume, options.run_dir, options.attempt) == (Path("b"), Path("r/a2"), "a2")
    assert options.settings == {"x.y": "2"}


def test_what_a_trainer_does_not_do_is_refused() -> None:
    options = parse([*BOTH, "--set", "steps=5", "--set", "optim.peak_lr=0.1", "--data", "d", "--init-from", "w"])
    options.accept_only(["steps", "optim.peak_lr"], ["data", "init-from"])
    with pytest.raises(UserError, match=r"--set optim.peak_lr: no such setting. Settings: every, steps\."):
        options.accept_only(["steps", "every"], ["data", "init-from"])
    with pytest.raises(UserError, match="--init-from: this trainer does not do that"):
        options.accept_only(["steps", "optim.peak_lr"], ["data"])
    with pytest.raises(UserError, match="--fast: no such option"):
        parse([*BOTH, "--fast"]).accept_only([])


@pytest.mark.parametrize("text", ["-1", "1.0", "1e3", "", " 5", "٣", "9" * 30])
def test_a_setting_that_must_be_a_whole_number(text: str) -> None:
    assert parse([*BOTH]).whole("steps", 3) == 3
    assert parse([*BOTH, "--set", "steps=007"]).whole("steps", 3) == 7
    with pytest.raises(UserError, match="expected a whole number"):
        parse([*BOTH, "--set", f"steps={text}"]).whole("steps", 3)


def test_take_leaves_the_rest_to_the_scripts_own_parser() -> None:
    program = (
        "import sys, argparse; from opt_ops.contract.options import parse, take; take();"
        "p = argparse.ArgumentParser(); p.add_argument('--lr'); lr = p.parse_args().lr;"
        "print(lr, parse().attempt, sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program, *BOTH, "--lr", "3"], capture_output=True, text=True)
    assert done.stdout == "3 a1 ['--lr', '3']\n", done.stderr
