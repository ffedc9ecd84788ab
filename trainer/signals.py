"""What reaches this process by signal. Installed first of all, before torch is imported."""

import contextlib
import os
import signal
import threading

_HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """SIGTERM and SIGINT end the process at once; SIGUSR1 asks for a checkpoint.

    At once means: even while the main thread waits in a collective for a peer that is gone. Python runs its signal
    handlers between bytecodes of the main thread, which may never come. The interpreter's C handler, however, writes
    the signal's number to a pipe, and a thread waits at its other end.

    One instance per process, made on the main thread.

    Attributes:
        save_requested: set by SIGUSR1. Whoever saves a checkpoint clears it before the state is copied.
    """

    def __init__(self) -> None:
        self.save_requested = threading.Event()
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in _HEEDED:
            signal.signal(number, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR1, False)  # training goes on, and so must the system call under way
        # Who starts us may hold signals back until we are ready for them: here is where they are remembered from.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEEDED)
        threading.Thread(target=self._heed, daemon=True, name="signals").start()

    def _heed(self) -> None:
        while True:
            number = os.read(self._read, 1)[0]
            if number == signal.SIGUSR1:
                self.save_requested.set()
            else:
                with contextlib.suppress(OSError):  # no room for last words is no reason to stay
                    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
                os._exit(128 + number)
