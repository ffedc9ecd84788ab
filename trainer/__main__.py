"""``python -m trainer``: read the command line, train, and say by the exit code how it ended."""

import argparse
import contextlib
import faulthandler
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from opt_ops.contract.manifest import CheckpointError
from opt_ops.contract.signals import Signals
from trainer import recipes
from trainer.console import say
from trainer.errors import (
    CorruptionError,
    LossScaleError,
    NonFiniteError,
    PeerCorruptionError,
    SupersededError,
    UserError,
)

EXIT_UNFORESEEN = 1
EXIT_OUT_OF_MEMORY = 84
EXIT_CODES: dict[type[Exception], int] = {
    UserError: 78,
    CheckpointError: 65,
    NonFiniteError: 82,
    SupersededError: 83,
    CorruptionError: 85,
    LossScaleError: 86,
    PeerCorruptionError: 87,
}

_EXAMPLES = """\
examples:
  python -m trainer --recipe opt-tiny --run-dir runs/1/1.00/a1 --checkpoint-dir runs/1/1.00/checkpoints
  torchrun --nproc-per-node 4 -m trainer --recipe opt-tiny --set parallel.tp=2 --run-dir … --checkpoint-dir …
  python -m trainer --recipe opt-tiny --run-dir runs/1/1.01/a1 --checkpoint-dir runs/1/1.01/checkpoints \\
      --resume runs/1/1.00/checkpoints/step-00000450 --lr-factor 450:0.75 --skip-batches 451:510

exit codes:
  0 done; 1 unforeseen error; 65 bad checkpoint; 78 user error; 82 training diverged; 83 a newer attempt exists;
  84 out of memory; 85 this rank's data is corrupt; 86 loss scale at its floor; 87 another rank's data is corrupt;
  130, 143 stopped by a signal
"""


def main(signals: Signals) -> int:
    """Parse, train, and return the exit code."""
    process_start = time.monotonic()
    try:
        arguments = _parser().parse_args()
        if arguments.list_recipes:
            _list_recipes()
        else:
            _train(arguments, process_start, signals)
    except tuple(EXIT_CODES) as error:
        say(f"error: {error}", sys.stderr)
        return EXIT_CODES[type(error)]
    except Exception as error:  # noqa: BLE001  the last line of defence: everything else is exit code 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
        if not _is_out_of_memory(error):
            return EXIT_UNFORESEEN
        say(
            "error: out of memory; the traceback above says where. Lower data.micro_batch, or spread the model over "
            "more ranks (more nodes, a higher parallel.tp).",
            sys.stderr,
        )
        return EXIT_OUT_OF_MEMORY
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU's allocator or torch's CPU allocator, which has no exception of its own, has run out."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def _train(arguments: argparse.Namespace, process_start: float, signals: Signals) -> None:
    for option in ("recipe", "run_dir", "checkpoint_dir"):
        if getattr(arguments, option) is None:
            raise UserError(f"--{option.replace('_', '-')} is required; --help shows examples.")
    if arguments.fence and not arguments.attempt:
        raise UserError("--fence needs --attempt: which of the attempts that the file may name is this one?")
    if arguments.fence:
        signals.leave_sigterm_to_supervisor()
    recipe = recipes.build(arguments.recipe, arguments.set)
    lr_factors = [_lr_factor(text) for text in arguments.lr_factor]
    skips = [_skip(text) for text in arguments.skip_batches]
    from trainer.loop import Job, train  # torch comes in here, after all that can be told without it

    train(
        Job(
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
            valid=arguments.valid,
            tokenizer=arguments.tokenizer,
            fence=arguments.fence,
            snapshot_dir=arguments.snapshot_dir,
            checkpoint_copy=arguments.checkpoint_copy,
            process_start=process_start,
            signals=signals,
        )
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would exit with 2, which is not in the table of exit codes
        raise UserError(f"{message}; --help shows examples.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer",
        description="Pre-train an OPT language model, alone or as one of the ranks that torchrun or Slurm started.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list-recipes", action="store_true", help="print recipes and their settings, and exit")
    parser.add_argument("--recipe", metavar="NAME", help="what to train")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting of the recipe; repeatable"
    )
    _add_places(parser)
    _add_beginnings(parser)
    _add_data(parser)
    parser.add_argument("--attempt", metavar="ID", help="name of this attempt (default: the name of --run-dir)")
    parser.add_argument("--fence", metavar="FILE", type=Path, help="leave when this file names another attempt")
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", metavar="DIR", type=Path, help="folder of this attempt: configuration, telemetry")
    parser.add_argument("--checkpoint-dir", metavar="DIR", type=Path, help="folder of this run's checkpoints")
    parser.add_argument(
        "--snapshot-dir",
        metavar="DIR",
        type=Path,
        help="folder on the node's own disk for snapshots between checkpoints; {node} stands for the node's name",
    )
    parser.add_argument(
        "--checkpoint-copy",
        metavar="URL",
        default="",
        help="second place for checkpoints, at any URL that fsspec knows: s3://bucket/run, or a folder",
    )


def _add_beginnings(parser: argparse.ArgumentParser) -> None:
    """What training begins with, and what is changed from there on."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="CHECKPOINT", type=Path, help="continue from this step-… folder")
    start.add_argument("--from-scratch", action="store_true", help="start over although there are checkpoints")
    parser.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        type=Path,
        help="begin with the weights of this checkpoint, which trainer.convert may have made; --resume outranks it",
    )
    parser.add_argument(
        "--lr-factor",
        metavar="STEP:FACTOR",
        action="append",
        default=[],
        help="multiply the learning rate of all updates after STEP; repeatable",
    )
    parser.add_argument(
        "--skip-batches",
        metavar="FIRST:LAST",
        action="append",
        default=[],
        help="leave these batches of the original order out, both included, 1 being the first; repeatable",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="[NAME=]PATH[:WEIGHT]",
        action="append",
        default=[],
        help='JSONL file with a "text" per line, or a folder of them; repeatable: all are one corpus, or each, with '
        "weights, one of its own (default: Python's own manual)",
    )
    parser.add_argument(
        "--valid",
        metavar="[NAME=]PATH[:EVERY]",
        action="append",
        default=[],
        help="the same for a corpus to evaluate on, every so many updates (default: evaluate_every); repeatable",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="tokenizer.json, or a folder with vocab.json and merges.txt (default: trained on the data)",
    )


def _lr_factor(text: str) -> tuple[int, float]:
    step, _, factor = text.partition(":")
    try:
        pair = int(step), float(factor)
    except ValueError:
        pair = 0, 0.0
    if not 0 < pair[1] < math.inf:
        raise UserError(f"--lr-factor {text}: expected STEP:FACTOR with a factor above 0, for example 450:0.75.")
    return pair


def _skip(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last)
    except ValueError:
        window = 0, 0
    if not 1 <= window[0] <= window[1]:
        raise UserError(
            f"--skip-batches {text}: expected FIRST:LAST, two batches of which the first is at least 1 and the last "
            "not before it, for example 301:360."
        )
    return window


def _list_recipes() -> None:
    for name, recipe in recipes.RECIPES.items():
        print(f"{name}: {recipe.__doc__}")
        for key, value in recipes.settings_of(recipe()):
            print(f"  {key}={','.join(map(str, value)) if isinstance(value, tuple) else value}")


if __name__ == "__main__":
    faulthandler.enable()
    # As early as can be: up to here only the standard library was imported; torch comes in within main().
    code = main(Signals())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # Without the interpreter's farewell: it joins background threads, and one may wait for a peer that is gone.
    os._exit(code)
