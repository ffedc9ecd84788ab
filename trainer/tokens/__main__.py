"""``python -m trainer.tokens build``: tokenise a run's data before the run, which then starts at once."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from trainer.console import say
from trainer.data import tokens
from trainer.data.corpus import training_corpora, validation_corpora
from trainer.errors import UserError
from trainer.recipes import DataConfig

_EXAMPLES = """\
examples:
  python -m trainer.tokens build --data corpus/ --tokenizer gpt2/
  python -m trainer.tokens build --data wiki=wiki/:0.3 --data books=books/:0.7 --valid held-out.jsonl --tokenizer gpt2/

The tokens go to $OPT_OPS_CACHE (default: ~/.cache/opt-ops), where `python -m trainer` with the same --data and
--tokenizer finds them. A build that was interrupted goes on where it was.
exit codes: 0 done; 1 unforeseen error; 78 user error
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows examples.")


def main() -> int:
    """Parse, build, and return the exit code."""
    try:
        _build(_parser().parse_args())
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 78
    return 0


def _build(arguments: argparse.Namespace) -> None:
    corpora = training_corpora(arguments.data)
    definition = tokens.find(arguments.tokenizer, corpora, arguments.vocab_size)
    limits = tokens.Limits(corrupt_lines=arguments.max_corrupt_lines, workers=arguments.workers)
    for corpus in [*corpora, *validation_corpora(arguments.valid)]:
        file = tokens.load(corpus, definition, limits)
        left_out = f", {len(file.corrupt_lines)} corrupt lines left out" if file.corrupt_lines else ""
        say(f"{file.name}: {len(file.ids):,} tokens in {len(file.bounds) - 1:,} documents{left_out}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m trainer.tokens", allow_abbrev=False, description=__doc__)
    build = parser.add_subparsers(required=True, metavar="build").add_parser(
        "build",
        help="tokenise corpora",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    build.add_argument(
        "--data", metavar="[NAME=]PATH[:WEIGHT]", action="append", default=[], help="as for python -m trainer"
    )
    build.add_argument(
        "--valid", metavar="[NAME=]PATH[:EVERY]", action="append", default=[], help="as for python -m trainer"
    )
    build.add_argument("--tokenizer", metavar="PATH", type=Path, help="as for python -m trainer")
    build.add_argument(
        "--vocab-size", metavar="N", type=int, default=50272, help="of the model; without --tokenizer, of one trained"
    )
    build.add_argument(
        "--max-corrupt-lines",
        metavar="N",
        type=int,
        default=DataConfig.__dataclass_fields__["max_corrupt_lines"].default,
        help="leave out as many lines of a corpus that are no documents (default: %(default)s)",
    )
    build.add_argument(
        "--workers", metavar="N", type=int, default=tokens.workers_here(), help="processes (default: one a core)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
