"""The command ``python -m trainer``: read the command line, train, and end with the exit code for the outcome."""

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from opt_ops.contract import warm_start
from opt_ops.contract.data_since import parse_data_since
from opt_ops.contract.environment import place_from_environment
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.learning_rate import parse_lr_factor
from opt_ops.contract.signals import Signals
from opt_ops.contract.skip_windows import parse_skip_window
from trainer import recipes
from trainer.command import Parser
from trainer.console import print_line
from trainer.errors import UserError, exit_code
from trainer.preconditions import require_own_folders, require_packages
from trainer.sources import has_changed, running_code

_Pair = TypeVar("_Pair")

_OUT_OF_MEMORY = (
    "out of memory; the traceback above says where. Lower data.micro_batch, or spread the model over more ranks (more "
    "nodes, a higher parallel.tp)."
)

_EXAMPLES = """\
examples:
  python -m trainer --recipe opt-tiny --run-dir runs/1/1.00/a1 --checkpoint-dir runs/1/1.00/checkpoints
  torchrun --nproc-per-node 4 -m trainer --recipe opt-tiny --set parallel.tp=2 --run-dir … --checkpoint-dir …
  python -m trainer --recipe opt-tiny --run-dir runs/1/1.01/a1 --checkpoint-dir runs/1/1.01/checkpoints \\
      --resume runs/1/1.00/checkpoints/step-00000450 --lr-factor 450:0.75 --skip-batches 451:510

exit codes:
  0 all steps are done; 1 unexpected error; 65 checkpoint missing or damaged; 78 user error;
  82 loss or gradient norm not finite; 83 a newer attempt exists; 84 out of memory;
  85 data of this rank is corrupt; 86 loss scale at its floor; 87 data of another rank is corrupt;
  88 ranks were lost and no common step is left; 130, 143 stopped by a signal
"""


def main(signals: Signals) -> int:
    """Read the command line, train, and return the exit code.

    Args:
        signals: the signal handlers of this process.
    """
    process_start = time.monotonic()
    try:
        arguments = _parser().parse_args()
        if arguments.list_recipes:
            _list_recipes()
        elif arguments.recipes:
            _print_recipes(arguments)
        elif arguments.check:
            _check(arguments)
        else:
            _train(arguments, process_start, signals)
    except Exception as error:  # noqa: BLE001  each error ends with an exit code
        code = exit_code(error)
        if code in (ExitCode.UNEXPECTED_ERROR, ExitCode.OUT_OF_MEMORY):
            with contextlib.suppress(OSError):
                traceback.print_exc()
        if code is not ExitCode.UNEXPECTED_ERROR:
            print_line(f"error: {_OUT_OF_MEMORY if code is ExitCode.OUT_OF_MEMORY else error}", sys.stderr)
        return code
    return ExitCode.DONE


def _check(arguments: argparse.Namespace) -> None:
    """Find what training would refuse. Run folder and checkpoint folder may be left out: they come later."""
    from trainer.check import check

    _require(arguments, "recipe")
    recipe = recipes.build(arguments.recipe, arguments.set)
    for text in arguments.lr_factor:
        _parsed("--lr-factor", parse_lr_factor, text)
    for text in arguments.skip_batches:
        _parsed("--skip-batches", parse_skip_window, text)
    place = place_from_environment(os.environ)
    if arguments.run_dir and arguments.checkpoint_dir:
        may_hold = bool(arguments.resume) or arguments.from_scratch
        require_own_folders(arguments.run_dir, arguments.checkpoint_dir, may_hold_checkpoints=may_hold)
    dp, tp = check(
        recipe,
        place.world,
        data=arguments.data,
        since=_data_since(arguments),
        valid=arguments.valid,
        tokenizer=arguments.tokenizer,
        resume=arguments.resume,
        init_from=arguments.init_from,
    )
    steps, warm_up = recipe.steps, recipe.optim.warmup_steps
    if 2 * warm_up > steps:
        rises = f"all {steps:,} steps" if warm_up >= steps else f"{warm_up:,} of {steps:,} steps"
        print_line(f"note: the learning rate rises for {rises}; --set optim.warmup_steps makes the warm-up shorter")
    print_line(f"{arguments.recipe}: nothing is wrong; ranks {place.world} (dp {dp} × tp {tp})")


def _require(arguments: argparse.Namespace, *options: str) -> None:
    for option in options:
        if getattr(arguments, option) is None:
            raise UserError(f"--{option.replace('_', '-')} is required; --help shows examples.")


def _train(arguments: argparse.Namespace, process_start: float, signals: Signals) -> None:
    _require(arguments, "recipe", "run_dir", "checkpoint_dir")
    if arguments.fence and not arguments.attempt:
        raise UserError("--fence needs --attempt: the name of this attempt, as the file would give it.")
    if arguments.fence:
        signals.leave_sigterm_to_supervisor()
    recipe = recipes.build(arguments.recipe, arguments.set)
    lr_factors = [_parsed("--lr-factor", parse_lr_factor, text) for text in arguments.lr_factor]
    skips = [_parsed("--skip-batches", parse_skip_window, text) for text in arguments.skip_batches]
    require_packages()
    from trainer.loop import TrainJob, train  # imports torch, so errors that need no torch are found first

    train(
        TrainJob(
            recipe_name=arguments.recipe,
            recipe=recipe,
            run_dir=arguments.run_dir,
            checkpoint_dir=arguments.checkpoint_dir,
            attempt=arguments.attempt or arguments.run_dir.name,
            resume=arguments.resume,
            from_scratch=arguments.from_scratch,
            init_from=arguments.init_from,
            lr_factors=lr_factors,
            skips=skips,
            data=arguments.data,
            data_since=_data_since(arguments),
            valid=arguments.valid,
            tokenizer=arguments.tokenizer,
            fence=arguments.fence,
            snapshot_dir=arguments.snapshot_dir,
            checkpoint_copy=arguments.checkpoint_copy,
            process_start=process_start,
            signals=signals,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer",
        description="Pre-train an OPT language model, in one process or as one of the ranks of torchrun or Slurm.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list-recipes", action="store_true", help="print all recipes with their settings, and exit")
    parser.add_argument(
        "--recipes",
        action="store_true",
        help="print recipes as JSON, and exit: all, or with its settings the one of --recipe",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train nothing: find what training would refuse before its first step (exit code 78 or 65), without torch",
    )
    parser.add_argument("--recipe", metavar="NAME", help="the recipe to train")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting of the recipe; repeatable"
    )
    _add_places(parser)
    _add_start(parser)
    _add_data(parser)
    parser.add_argument("--attempt", metavar="ID", help="name of this attempt (default: the name of --run-dir)")
    parser.add_argument(
        "--fence", metavar="FILE", type=Path, help="end with exit code 83 when this file names another attempt"
    )
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="folder of this attempt, for configuration and telemetry"
    )
    parser.add_argument("--checkpoint-dir", metavar="DIR", type=Path, help="folder for the checkpoints of this run")
    parser.add_argument(
        "--snapshot-dir",
        metavar="DIR",
        type=Path,
        help="folder on the node's own disk, for snapshots between checkpoints; {node} stands for the node's name",
    )
    parser.add_argument(
        "--checkpoint-copy",
        metavar="URL",
        default="",
        help="where to copy each checkpoint to: a folder, or any URL that fsspec knows, such as s3://bucket/run",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    """Options for what training starts with, and for what changes from there on."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this step-… folder")
    start.add_argument("--from-scratch", action="store_true", help="start over although there are checkpoints")
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        type=Path,
        help="start with the weights of this checkpoint, for example from trainer.convert; --resume has precedence",
    )
    parser.add_argument(
        "--lr-factor",
        metavar="STEP:FACTOR",
        action="append",
        default=[],
        help="multiply the learning rate of all updates after STEP by FACTOR; repeatable",
    )
    parser.add_argument(
        "--skip-batches",
        metavar="FIRST:LAST",
        action="append",
        default=[],
        help="skip batches FIRST to LAST of the original order, both included; 1 is the first batch; repeatable",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="[NAME=]PATH[:WEIGHT]",
        action="append",
        default=[],
        help='file of JSON lines with a "text" in each, or a folder of *.jsonl files; repeatable. A *.txt file is one '
        "document of plain text. Of a *.py file the long string constants are one. Without weights all paths are one "
        "corpus; with weights each is a corpus of its own (default: the texts of Python's standard library)",
    )
    parser.add_argument(
        "--data-since",
        metavar="STEP:[NAME=]PATH[:WEIGHT]",
        action="append",
        default=[],
        help="train on this instead of --data in all updates after STEP; repeatable: once for each corpus and step",
    )
    parser.add_argument(
        "--valid",
        metavar="[NAME=]PATH[:EVERY]",
        action="append",
        default=[],
        help="a corpus to evaluate on after each EVERY updates (default: evaluate_every); repeatable",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="tokenizer.json, or a folder with vocab.json and merges.txt (default: trained on the data)",
    )


def _data_since(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    return [_parsed("--data-since", parse_data_since, text) for text in arguments.data_since]


def _parsed(option: str, parse: Callable[[str], _Pair], text: str) -> _Pair:
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: {error}") from None


def _list_recipes() -> None:
    for name, recipe in recipes.RECIPES.items():
        print_line(f"{name}: {recipe.__doc__}")
        for key, value in recipes.settings_of(recipe()):
            print_line(f"  {key}={_as_set(value)}")


def _as_set(value: Any) -> str:
    """The value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_recipes(arguments: argparse.Namespace) -> None:
    from trainer.model.cost import parameters

    for name in [arguments.recipe] if arguments.recipe else recipes.RECIPES:
        recipe = recipes.build(name, arguments.set)
        about = {
            "recipe": name,
            "parameters": parameters(recipe.model),
            "steps": recipe.steps,
            "tokens": recipe.steps * recipe.data.global_batch * recipe.data.seq_len,
            "seq_len": recipe.data.seq_len,
            "tp": recipe.parallel.tp,
            "about": " ".join((recipes.RECIPES[name].__doc__ or "").split()),
        }
        if arguments.recipe:
            about["settings"] = dict(recipes.settings_of(recipe))
        print(json.dumps(about))


if __name__ == "__main__":
    faulthandler.enable()
    running_code()  # what is imported from here on is that code
    if warm_start.asked():
        for module in ("trainer.loop", "torch._dynamo"):  # torch imports the second one in its first pass
            importlib.import_module(module)
        warm_start.serve(outdated=has_changed)  # returns in a process that shall train
    # The handlers come first: until here only the standard library was imported. main() imports torch.
    code = main(Signals())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit(): it joins background threads, and one of them may wait for a lost peer.
    os._exit(code)
