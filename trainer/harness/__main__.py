"""The command ``python -m trainer.harness``: score tasks and complete prompts with a model in Hugging Face's format.

Each result is a file that appears when it is complete, so a process that is killed loses only the task it was at.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

from opt_ops.contract.exit_codes import ExitCode
from trainer.command import exit_code_of
from trainer.console import print_line

_LONGEST = 400  # characters of a message
_EPILOG = """\
exit codes:
  0 done; 1 a task or the prompts failed, all others are written; 78 there is no such task
"""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, and return the exit code."""
    given = _parser().parse_args(arguments)
    os.dup2(2, 1)  # libraries print to both; what we have to say is in files
    return exit_code_of(lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    from trainer.harness.loading import NoRoom, load

    about = json.loads(given.about)
    tasks = None
    if given.task:
        from trainer.harness.scoring import Tasks

        tasks = Tasks([name for name, _, _ in given.task])
    try:
        loaded = load(given.model)
    except NoRoom as error:
        print_line(f"error: {error}", sys.stderr)
        return ExitCode.UNEXPECTED_ERROR
    failed = 0
    if tasks is not None:
        scores = tasks.scorer(loaded)
        for number, (name, target, definition) in enumerate(given.task, start=1):
            print_line(f"task {number} of {len(given.task)}: {tasks.title(name)}", sys.stderr)
            try:
                origin = {**about, "definition": definition}
                scores.write(name, Path(target), given.documents, given.shots, given.limit, origin)
            except Exception as error:  # noqa: BLE001  a task whose data is missing must not cost the others
                traceback.print_exc()
                print_line(f"error: task {tasks.title(name)}: {_in_one_line(error)}", sys.stderr)
                failed += 1
    if given.prompts:
        from trainer.harness.completing import write

        try:
            write(loaded, given.prompts, given.completions, given.tokens, given.seed, about)
        except Exception as error:  # noqa: BLE001  as above
            traceback.print_exc()
            print_line(f"error: the prompts: {_in_one_line(error)}", sys.stderr)
            failed += 1
    return ExitCode.UNEXPECTED_ERROR if failed else ExitCode.DONE


def _in_one_line(error: Exception) -> str:
    """The message. A YAML file's is of several lines, and the last ones say where the mistake is."""
    return " ".join(str(error).split())[:_LONGEST] or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.harness",
        description="Score tasks of lm-evaluation-harness, and complete prompts, with a converted checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", metavar="DIR", type=Path, required=True, help="weights and tokenizer")
    parser.add_argument("--about", metavar="JSON", default="{}", help="what each result file says of its origin")
    parser.add_argument(
        "--task",
        metavar=("NAME", "FILE", "DEFINITION"),
        nargs=3,
        action="append",
        default=[],
        help="a task by its name or its YAML file, the result file, and what that file says of the task's definition",
    )
    parser.add_argument("--documents", metavar="DIR", type=Path, help="folder for the documents of the tasks")
    parser.add_argument("--shots", metavar="N", type=int, default=0, help="examples in front of each question")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first documents of each task")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="one prompt a line")
    parser.add_argument("--completions", metavar="FILE", type=Path, help="result file of the prompts")
    parser.add_argument("--tokens", metavar="N", type=int, default=60, help="at most so many in a completion")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of the drawn completions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
