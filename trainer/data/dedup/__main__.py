"""The command ``python -m trainer.data.dedup``: text without duplicates and without what a model is tested on."""

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from opt_ops.contract.exit_codes import ExitCode
from trainer.command import Parser, exit_code_of
from trainer.console import print_line
from trainer.errors import UserError
from trainer.preconditions import require_packages

_EXAMPLES = """\
examples:
  python -m trainer.data.dedup wiki/ books.jsonl --out clean
  python -m trainer.data.dedup wiki/ --out clean --against valid.jsonl evaluations/documents/
  python -m trainer.data.dedup new.jsonl --out new-clean --against-duplicates clean
  python -m trainer.data.dedup web/ --out clean --engine datatrove --slurm partition=cpu,time=04:00:00,account=nlp

clean/ then has one file for each input with the lines that stay, byte for byte;
removed.jsonl.gz; and dedup.json. Train on it: --data clean. An interrupted command
goes on where it was when it is given again.
exit codes: 0 done; 1 unexpected error, or jobs that failed; 2 the engine is not installed; 78 user error
"""

_EXTRAS = {"rensa": "data", "datatrove": "data-cluster"}
_NOT_INSTALLED = 2
_OWN_OPTIONS = {"array", "output", "error", "job-name", "export", "dependency", "requeue", "wrap", "chdir"}


def main() -> int:
    """Read the command line, write the folder, print what was done, and return the exit code."""
    try:
        return exit_code_of(
            lambda: _write(_parser().parse_args()), kept="Finished pieces are kept: the same command goes on from them."
        )
    except KeyboardInterrupt:
        print_line("interrupted. The same command goes on from what is finished.", sys.stderr)
        return 128 + signal.SIGINT


def _write(given: argparse.Namespace) -> int:
    require_packages()
    if find_spec(given.engine) is None:
        extra = f"{sys.executable} -m pip install 'opt-ops[{_EXTRAS[given.engine]}]'"
        print_line(f"error: {given.engine} is not installed for {sys.executable}: {extra}.", sys.stderr)
        return _NOT_INSTALLED
    _check(given)
    from trainer.data.dedup.run import run
    from trainer.data.dedup.work import Options
    from trainer.data.tokens import usable_cores

    options = Options(
        inputs=tuple(given.inputs),
        out=given.out,
        against=tuple(given.against),
        known=tuple(given.against_duplicates),
        threshold=given.threshold,
        seed=given.seed,
        workers=given.workers or (usable_cores() if given.slurm is None else None),
        engine=given.engine,
        slurm=None if given.slurm is None else _slurm(given.slurm),
    )
    print(json.dumps(run(options, lambda line: print_line(line, sys.stderr)), indent=1))
    return ExitCode.DONE


def _check(given: argparse.Namespace) -> None:
    from trainer.data.dedup.sketch import LEAST_THRESHOLD

    if not LEAST_THRESHOLD <= given.threshold <= 1:
        raise UserError(f"--threshold {given.threshold:g}: at least {LEAST_THRESHOLD:g} and at most 1.")
    if not 0 <= given.seed < 1 << 32:
        raise UserError(f"--seed {given.seed}: at least 0 and below {1 << 32}.")
    if given.workers is not None and given.workers < 1:
        raise UserError(f"--workers {given.workers}: at least 1.")
    if given.slurm is not None and given.engine != "datatrove":
        raise UserError("--slurm needs --engine datatrove: rensa works on this machine alone.")


def _slurm(given: Sequence[str]) -> dict[str, str]:
    """The long options of sbatch, by name."""
    found: dict[str, str] = {}
    for text in (each for one in given for each in re.split(r",(?=[\w-]+=)", one)):
        name, equals, value = text.partition("=")
        name = name.replace("_", "-")
        if not equals or not re.fullmatch(r"[a-z][a-z-]*", name) or not re.fullmatch(r"\S+", value):
            raise UserError(f"--slurm {text}: expected KEY=VALUE with a long option of sbatch, such as partition=cpu.")
        if name in _OWN_OPTIONS:
            raise UserError(f"--slurm {text}: {name} is set for each job here.")
        found[name] = value
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
        "--workers",
        metavar="N",
        type=int,
        help="processes at once (default: one for each core; with --slurm: no limit)",
    )
    parser.add_argument(
        "--engine",
        choices=sorted(_EXTRAS),
        default="rensa",
        help="rensa: one machine; datatrove: also a cluster; the result is the same (default: rensa)",
    )
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE",
        nargs="*",
        help="run datatrove's tasks as jobs of Slurm; keys are long options of sbatch",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
