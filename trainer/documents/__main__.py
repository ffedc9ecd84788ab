"""The command ``python -m trainer.documents``: print the documents that samples were made of, as JSON lines."""

import argparse
import json
import sys
from pathlib import Path

from opt_ops.contract.data_since import parse_data_since
from trainer.command import Parser, exit_code_of
from trainer.console import print_line
from trainer.errors import UserError
from trainer.preconditions import require_packages

_EXAMPLES = """\
examples:
  python -m trainer.documents runs/12/12.00/a1/config.json --first 329848 --count 8 --data corpus/
  python -m trainer.documents runs/12/12.00/a1/config.json --first 329848 --count 8 --data corpus/ \\
      --checkpoint runs/12/12.00/checkpoints/step-00041200

`opt-ops data show` asks this. It finds samples, data and checkpoint by the step.
exit codes: 0 done; 1 unexpected error; 65 checkpoint missing or damaged; 78 user error
"""


def main() -> int:
    """Read the command line, print one line for each part of a document, and return the exit code."""
    return exit_code_of(lambda: _show(_parser().parse_args()))


def _show(arguments: argparse.Namespace) -> None:
    require_packages()
    from trainer.documents import recorded
    from trainer.documents.parts import parts, with_losses

    if arguments.first < 0 or arguments.count < 1:
        raise UserError("--first must be at least 0, and --count at least 1.")
    attempt = recorded.read(arguments.config)
    try:
        since = [parse_data_since(text) for text in arguments.data_since]
    except ValueError as error:
        raise UserError(f"--data-since: {error}") from error
    data, files = recorded.load(attempt, arguments.data, since)
    samples = data.samples(attempt.seq_len, attempt.settings["seed"], attempt.firsts)
    pieces = [samples.pieces(arguments.first + index) for index in range(arguments.count)]
    rows = parts(data, files, pieces, _progress)
    if arguments.checkpoint:
        from trainer.documents.losses import Samples, losses

        at_once = attempt.settings["data"]["micro_batch"]
        each = losses(arguments.checkpoint, Samples(samples, arguments.first, arguments.count, at_once), _progress)
        rows = with_losses(rows, pieces, each)
    for row in rows:
        print(json.dumps(row))


def _progress(line: str) -> None:
    print_line(line, sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.documents",
        allow_abbrev=False,
        description="Print the parts of documents that samples were made of, one JSON object a line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config.json of the attempt that trained on them")
    parser.add_argument(
        "--first", metavar="N", type=int, required=True, help="index in the lineage of the first sample"
    )
    parser.add_argument("--count", metavar="N", type=int, required=True, help="number of samples")
    parser.add_argument(
        "--data", metavar="[NAME=]PATH[:WEIGHT]", action="append", default=[], help="as for python -m trainer"
    )
    parser.add_argument(
        "--data-since",
        metavar="STEP:[NAME=]PATH[:WEIGHT]",
        action="append",
        default=[],
        help="as for python -m trainer",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="a step-… folder: print the mean loss of each part under its weights, and the highest first",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
