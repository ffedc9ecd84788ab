"""How a rank reacts to signals. Create :class:`Signals` first of all, before torch is imported."""

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """SIGTERM and SIGINT end the process at once. SIGUSR1 requests a checkpoint, SIGUSR2 the stacks of all threads.

    "At once" includes a main thread that waits in a collective for a lost peer. Python runs its signal handlers
    between two bytecodes of the main thread, and the next bytecode may never come. But the interpreter's C handler
    writes the number of the signal to a pipe, and a thread of this class reads that pipe.

    Create one instance per process, on the main thread.

    Attributes:
        save_requested: set by SIGUSR1. The code that saves a checkpoint clears it before it copies the state.

    Raises:
        RuntimeError: this is not the main thread.
    """

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "Python handles signals on its main thread only: create Signals (or Outside) there, before any other "
                "thread needs it, and pass it on."
            )
        self.save_requested = threading.Event()
        self._ignored: set[int] = set()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        self._write = write
        self._stacks = 2  # stderr, also where `sys.stderr` is something without a descriptor, as in a notebook
        self.install()
        # The parent may have blocked signals until the handlers are there. Pending ones are delivered now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        threading.Thread(target=self._handle, daemon=True, name="signals").start()

    def install(self) -> None:
        """Install the handlers. Call it again, on the main thread, after a framework has installed its own."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        # Chained: faulthandler writes the stacks in the C handler, whatever the interpreter does. The pipe comes next.
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.register(signal.SIGUSR2, self._stacks, chain=True)
        signal.siginterrupt(signal.SIGUSR1, False)  # training continues, so a running system call must continue too

    def leave_sigterm_to_supervisor(self) -> None:
        """Ignore SIGTERM from now on.

        A scheduler that ends a job sends SIGTERM to every process of the job, the supervisor included. The supervisor
        then requests one more checkpoint (SIGUSR1) before it ends the ranks (SIGINT).
        """
        self._ignored = {signal.SIGTERM}

    def dump_stacks_to(self, path: Path) -> None:
        """Append stacks to ``path`` instead of stderr from now on.

        The file is opened here, because later the process may be unable to open one. If it cannot be opened, stacks
        still go to stderr and a warning is logged.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            log.warning("note: stacks go to stderr: %s", error)
            return
        faulthandler.unregister(signal.SIGUSR2)
        faulthandler.register(signal.SIGUSR2, file, chain=True)
        self._stacks = file

    def _handle(self) -> None:
        while True:
            number = os.read(self._read, 1)[0]
            if number == signal.SIGUSR1:
                self.save_requested.set()
            elif number == signal.SIGUSR2:
                with contextlib.suppress(OSError):
                    os.write(self._stacks, f"end of dump {time.time():.3f}\n\n".encode())
            elif number not in self._ignored:
                with contextlib.suppress(OSError):  # a full disk must not keep the process alive
                    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
                os._exit(128 + number)
