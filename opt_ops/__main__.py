"""`python -m opt_ops` is `opt-ops`. What makes Ctrl-C silent comes before the commands are imported."""

import os
import signal
from types import FrameType

INTERRUPTED = 130  # as shells say it: 128 + SIGINT


def main() -> None:
    """Run the command. Ctrl-C ends it with code 130 and no traceback, also while it is imported or leaves."""
    quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the caller ignores it: so it stays
    if quiet:
        signal.signal(signal.SIGINT, _leave)
    from opt_ops.cli import main as run

    try:
        run()
    finally:
        if quiet:
            signal.signal(signal.SIGINT, _leave)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
