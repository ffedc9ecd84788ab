"""The command ``python -m trainer.kernels``. docs/kernels.md explains it.

``check`` compiles every kernel for GPUs that need not be here. ``record`` keeps what a GPU has shown of them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from opt_ops.contract.exit_codes import ExitCode
from trainer.console import print_line


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return 0, or 78 if it cannot run; ``check`` returns 1 for a kernel that spills or fails."""
    options = _parser().parse_args(arguments)
    return options.command(options)


def _record(options: argparse.Namespace) -> int:
    from trainer.kernels import records

    try:
        found = [records.Record(**row) for row in json.loads(options.file.read_text())]
        records.write(found)
    except (OSError, ValueError, TypeError) as error:
        print_line(f"error: {options.file} does not hold records of ops: {error}", sys.stderr)
        return ExitCode.USER_ERROR
    for it in found:
        reason = records.refusal(it.op, it.architecture, it.dtype)
        print_line(f"{it.op} {it.dtype} sm_{it.architecture}: {reason or 'kernels=auto uses it'}")
    return ExitCode.DONE


def _check(options: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no compiler
    from trainer.kernels import check  # after that, because it imports Triton
    from trainer.kernels.jit import LEAST_ARCHITECTURE

    if reason := check.cannot_compile():
        print_line(f"error: kernels cannot be compiled here. {reason}", sys.stderr)
        return ExitCode.USER_ERROR
    if old := [architecture for architecture in options.arch if architecture < LEAST_ARCHITECTURE]:
        print_line(f"error: --arch {old[0]}: kernels need {LEAST_ARCHITECTURE} or newer.", sys.stderr)
        return ExitCode.USER_ERROR
    asked = [(job, architecture) for job in check.jobs() for architecture in options.arch]
    table = check.check(asked, lambda line: print_line(line, sys.stderr))
    print_line(table.json().rstrip() if options.output == "json" else table.text())
    for trouble in table.troubles:
        print_line(f"error: {trouble}", sys.stderr)
    return ExitCode.UNEXPECTED_ERROR if table.troubles else ExitCode.DONE


def _architecture(text: str) -> int:
    return int(text.removeprefix("sm_").replace(".", ""))


_architecture.__name__ = "compute capability"  # argparse names it where a value is none


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.kernels",
        description="Check the machine code of the trainer's kernels, and record their tests on GPUs.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="compile every kernel for every shape of the published sizes",
        description="Compile every kernel for every shape of the nine published sizes, and print what the machine code "
        "needs. No GPU is needed. The exit code is 1 if a kernel spills registers, uses stack, or does not compile, "
        "and 78 if there is no compiler or --arch is too old. Progress goes to stderr.",
        allow_abbrev=False,
    )
    architectures = [80, 90, 100]
    check.add_argument(
        *("--arch", "-a"),
        type=_architecture,
        nargs="+",
        metavar="N",
        default=architectures,
        help="compute capabilities: 80 A100, 90 H100 and H200, 100 B200 (default: all three)",
    )
    check.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="form of the table (default: text)"
    )
    check.set_defaults(command=_check)
    record = commands.add_parser(
        "record",
        help="keep the results of the GPU tests, so that kernels=auto uses the ops that passed",
        description="Put the records that benchmarks/gpu_all.sh has made on a GPU into trainer/kernels/records.json. "
        "kernels=auto uses an op where its record is good. The command prints which ops these are. Commit the file.",
        allow_abbrev=False,
    )
    record.add_argument("file", type=Path, metavar="FILE", help="records.json in the folder of the benchmark")
    record.set_defaults(command=_record)
    return parser


if __name__ == "__main__":
    sys.exit(main())
