"""What reaches this process by signal. Installed first of all, before torch is imported."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from trainer.console import say

_HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """SIGTERM and SIGINT end the process at once; SIGUSR1 asks for a checkpoint, SIGUSR2 for all threads' stacks.

    At once means: even while the main thread waits in a collective for a peer that is gone. Python runs its signal
    handlers between bytecodes of the main thread, which may never come. The interpreter's C handler, however, writes
    the signal's number to a pipe, and a thread waits at its other end.

    One instance per process, made on the main thread.

    Attributes:
        save_requested: set by SIGUSR1. Whoever saves a checkpoint clears it before the state is copied.
    """

    def __init__(self) -> None:
        self.save_requested = threading.Event()
        self._deaf_to: set[int] = set()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _HEEDED:
            signal.signal(number, lambda *_: None)
        self._stacks = sys.stderr.fileno()
        # Chained: the dump is written in the C handler, whatever the interpreter is doing; then we hear of it.
        faulthandler.register(signal.SIGUSR2, self._stacks, chain=True)
        signal.siginterrupt(signal.SIGUSR1, False)  # training goes on, and so must the system call under way
        # Who starts us may hold signals back until we are ready for them: here is where they are remembered from.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEEDED)
        threading.Thread(target=self._heed, daemon=True, name="signals").start()

    def leave_sigterm_to_supervisor(self) -> None:
        """Heed SIGTERM no more: a scheduler that ends a job sends it to every process, and a supervisor that hears it,
        too, wants one more checkpoint of the ranks (SIGUSR1) before it ends them (SIGINT).
        """
        self._deaf_to = {signal.SIGTERM}

    def dump_stacks_to(self, path: Path) -> None:
        """Append stacks to ``path`` from now on, not to stderr; opened at once, since later may be too late."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            say(f"note: stacks go to stderr: {error}", sys.stderr)
            return
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.register(signal.SIGUSR2, file, chain=True)
        self._stacks = file

    def _heed(self) -> None:
        while True:
            number = os.read(self._read, 1)[0]
            if number == signal.SIGUSR1:
                self.save_requested.set()
            elif number == signal.SIGUSR2:
                with contextlib.suppress(OSError):
                    os.write(self._stacks, f"end of dump {time.time():.3f}\n\n".encode())
            elif number not in self._deaf_to:
                with contextlib.suppress(OSError):  # no room for last words is no reason to stay
                    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
                os._exit(128 + number)
