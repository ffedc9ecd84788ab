"""The command ``python -m trainer.data.dedup``: text without duplicates and without what a model is tested on."""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from opt_ops.contract.exit_codes import ExitCode
from trainer.console import print_line
from trainer.errors import UserError
from trainer.preconditions import require_packages

_EXAMPLES = """\
examples:
  python -m trainer.data.dedup wiki/ books.jsonl --out clean
  python -m trainer.data.dedup wiki/ --out clean --against valid.jsonl evaluations/documents/
  python -m trainer.data.dedup new.jsonl --out new-clean --against-duplicates clean

clean/ then has one file for each input with the lines that stay, byte for byte;
removed.jsonl.gz; and dedup.json. Train on it: --data clean. An interrupted command
goes on where it was when it is given again.
exit codes: 0 done; 1 unexpected error; 78 user error
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows examples.")


def main() -> int:
    """Read the command line, write the folder, print what was done, and return the exit code."""
    try:
        given = _parser().parse_args()
        require_packages()
        _check(given)
        from trainer.data.dedup.run import Options, run

        options = Options(
            inputs=tuple(given.inputs),
            out=given.out,
            against=tuple(given.against),
            known=tuple(given.against_duplicates),
            threshold=given.threshold,
            seed=given.seed,
            workers=given.workers,
        )
        print(json.dumps(run(options, lambda line: print_line(line, sys.stderr)), indent=1))
    except UserError as error:
        print_line(f"error: {error}", sys.stderr)
        return ExitCode.USER_ERROR
    except OSError as error:
        print_line(f"error: {error}. Finished pieces are kept: the same command goes on from them.", sys.stderr)
        return ExitCode.UNEXPECTED_ERROR
    return ExitCode.DONE


def _check(given: argparse.Namespace) -> None:
    if find_spec("rensa") is None:
        raise UserError(
            f"rensa is not installed for {sys.executable}: {sys.executable} -m pip install 'opt-ops[data]'."
        )
    if not 0 < given.threshold <= 1:
        raise UserError(f"--threshold {given.threshold:g}: more than 0 and at most 1.")
    if given.workers < 1:
        raise UserError(f"--workers {given.workers}: at least 1.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainer.data.dedup",
        allow_abbrev=False,
        description="Write the texts of JSONL files without copies, near copies and texts that a model is tested on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", metavar="IN", nargs="+", type=Path, help="JSONL file, or folder of such files")
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--threshold",
        metavar="J",
        type=float,
        default=0.95,
        help="Jaccard index of near copies (default: 0.95, as OPT)",
    )
    parser.add_argument(
        "--against", metavar="FILE", nargs="+", type=Path, default=[], help="texts that must not be trained on"
    )
    parser.add_argument(
        "--against-duplicates", metavar="DIR", nargs="+", type=Path, default=[], help="older corpora: no copies of them"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of the MinHash (default: 1)")
    parser.add_argument(
        "--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
