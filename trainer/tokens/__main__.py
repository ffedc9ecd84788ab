"""The command ``python -m trainer.tokens build``: tokenise the data of a run before the run starts."""

import argparse
import sys
from pathlib import Path

from trainer.command import Parser, exit_code_of
from trainer.console import print_line
from trainer.data import tokens
from trainer.data.corpus import training_corpora, validation_corpora
from trainer.recipes import DataConfig

_EXAMPLES = """\
examples:
  python -m trainer.tokens build --data corpus/ --tokenizer gpt2/
  python -m trainer.tokens build --data wiki=wiki/:0.3 --data books=books/:0.7 --valid held-out.jsonl --tokenizer gpt2/

The tokens go to $OPT_OPS_CACHE (default: ~/.cache/opt-ops). `python -m trainer` with the same --data and --tokenizer
finds them there. A build that was interrupted continues where it stopped.
exit codes: 0 done; 1 unexpected error; 78 user error
"""


def main() -> int:
    """Read the command line, build, and return the exit code."""
    return exit_code_of(lambda: _build(_parser().parse_args()))


def _build(arguments: argparse.Namespace) -> None:
    corpora = training_corpora(arguments.data)
    definition = tokens.find(arguments.tokenizer, corpora, arguments.vocab_size)
    limits = tokens.BuildLimits(corrupt_lines=arguments.max_corrupt_lines, workers=arguments.workers)
    for corpus in [*corpora, *validation_corpora(arguments.valid)]:
        file = tokens.load(corpus, definition, limits)
        skipped = f", {len(file.corrupt_lines)} corrupt lines skipped" if file.corrupt_lines else ""
        print_line(f"{file.name}: {len(file.ids):,} tokens in {len(file.bounds) - 1:,} documents{skipped}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m trainer.tokens", allow_abbrev=False, description="Tokenise the data of a run.")
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
        "--vocab-size",
        metavar="N",
        type=int,
        default=50272,
        help="of the model; without --tokenizer also of the tokenizer that is trained (default: %(default)s)",
    )
    build.add_argument(
        "--max-corrupt-lines",
        metavar="N",
        type=int,
        default=DataConfig.__dataclass_fields__["max_corrupt_lines"].default,
        help="skip up to N lines of a corpus that are no documents (default: %(default)s)",
    )
    build.add_argument(
        "--workers",
        metavar="N",
        type=int,
        default=tokens.usable_cores(),
        help="number of processes (default: one per core)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
