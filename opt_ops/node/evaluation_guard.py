"""Runs a command as the leader of its process group, and ends the group when the process that started it is gone.

    python -m opt_ops.node.evaluation_guard NICE COMMAND...

Its stdin is a pipe that nobody writes into: it closes when the starter dies, however it dies. What the command has
started is in the group, too, and would outlive its parent else. The code is that of the command, or 128 and the signal;
EVALUATION_HANGS if the command hangs. Then its starter kills what is left of the group, as at every end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from opt_ops.contract.exit_codes import EVALUATION_HANGS

LONGEST_SECONDS = 86_400.0
"""How long a command may run. One that hangs would keep every later evaluation waiting."""

_FIRST_OUT_OF_MEMORY = "1000"  # proc(5), oom_score_adj


def main() -> None:
    """Run the command that is in the arguments."""
    nice, command = int(sys.argv[1]), sys.argv[2:]
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_OUT_OF_MEMORY, encoding="ascii")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_starter, daemon=True).start()
    try:
        code = child.wait(LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        sys.exit(EVALUATION_HANGS)
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_starter() -> None:
    os.read(0, 1)  # returns when the pipe closes
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
