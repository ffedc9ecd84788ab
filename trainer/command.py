"""What the commands of this package share: a parser whose errors are ours, and the exit codes of errors."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.manifest import CheckpointError
from trainer.console import print_line
from trainer.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises a :class:`UserError`. argparse would exit with 2, which is not one of our exit codes."""

    def error(self, message: str) -> NoReturn:
        """Raise it, with where to look."""
        raise UserError(f"{message}; --help shows examples.")


def exit_code_of(work: Callable[[], int | None], kept: str = "") -> int:
    """Do the work of a command, and return its exit code. The message of an error is printed.

    Args:
        work: all of it. It may return an exit code of its own.
        kept: what to say of files after an error of the system. Empty: such an error is not expected, and is raised.
    """
    try:
        return work() or ExitCode.DONE
    except UserError as error:
        print_line(f"error: {error}", sys.stderr)
        return ExitCode.USER_ERROR
    except CheckpointError as error:
        print_line(f"error: {error}", sys.stderr)
        return ExitCode.CHECKPOINT_REFUSED
    except OSError as error:
        if not kept:
            raise
        print_line(f"error: {error}. {kept}", sys.stderr)
        return ExitCode.UNEXPECTED_ERROR
