"""End a rank because of an error, with the exit code of the contract."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from opt_ops.contract.errors import exit_code
from opt_ops.contract.exit_codes import ExitCode


@contextlib.contextmanager
def leaving_on_faults() -> Iterator[None]:
    """Ends the process, with the exit code of the contract, if the block raises an error.

    At once: the interpreter's own end may wait for threads and process groups, and those for ranks that are gone.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  all other errors end with exit code 1
        leave(error)


def leave(error: BaseException) -> NoReturn:
    """End this process because of ``error``."""
    code = exit_code(error)
    with contextlib.suppress(OSError):
        if code in (ExitCode.UNEXPECTED_ERROR, ExitCode.OUT_OF_MEMORY):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
