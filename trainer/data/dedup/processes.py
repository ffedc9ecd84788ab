"""Work for several processes on this machine, of which any may be killed."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from typing import Any

from trainer.errors import UserError

ATTEMPTS = 3  # of a piece whose process was killed, as by the kernel for its memory


def run_all(
    function: Callable[..., None],
    left: Callable[[], Sequence[tuple[Any, ...]]],
    workers: int,
    progress: Callable[[str], None],
) -> None:
    """Call ``function`` with each of the arguments that are left to do.

    Args:
        function: may be called again with arguments with which it was killed.
        left: says what is left now.
        workers: how many processes work at once.
        progress: is told a line after each call.

    Raises:
        UserError: processes were killed again and again.
    """
    for attempt in range(1, ATTEMPTS + 1):
        todo = left()
        try:
            _run(function, todo, min(workers, len(todo)), progress)
        except (BrokenProcessPool, ConnectionError, EOFError):  # the last two: the process that starts the others
            if attempt == ATTEMPTS:
                raise UserError(f"processes were killed {ATTEMPTS} times. Use fewer --workers.") from None
            progress("a process was killed: its pieces are done again")
        else:
            return


def _run(
    function: Callable[..., None], todo: Sequence[tuple[Any, ...]], workers: int, progress: Callable[[str], None]
) -> None:
    if not todo:
        return
    others = set(active_children())
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver"), initializer=_end_with_parent) as pool:
        futures = [pool.submit(function, *arguments) for arguments in todo]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(f"{done} of {len(todo)} pieces")
        except BaseException:  # an error of one piece, or Ctrl-C: nobody waits for the others
            for process in set(active_children()) - others:
                process.kill()
            raise


def _end_with_parent() -> None:
    """Ctrl-C is the parent's, and a process does not live on without it: it would write beside the next command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if (parent := parent_process()) is not None:
            with contextlib.suppress(OSError):
                parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
