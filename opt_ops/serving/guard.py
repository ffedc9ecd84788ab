"""Run an engine as long as a command wants it: `python -m opt_ops.serving.guard FOLDER PROGRAM ARGUMENTS...`.

The guard leads a process group, and its stdin is a pipe whose other end the command holds. The pipe ends with the
command, however that ends, SIGKILL included. Then the whole group ends: an engine's own processes as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from threading import Thread

from opt_ops.node.process_groups import die_with_parent

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


def main(folder: str, *command: str) -> None:
    """Start the engine in `folder`, and end the group when the engine or the pipe ends. It does not return."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # meant for the engine; a handler, unlike SIG_IGN, is not inherited
    try:
        engine = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  (it only calls prctl)
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(127)
    Thread(target=_end_with_pipe, args=(engine,), daemon=True).start()
    code = engine.wait()
    print(f"the engine ended with exit code {code}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)  # what it may have left, and the guard


def _end_with_pipe(engine: subprocess.Popen[bytes]) -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGTERM)
    try:
        engine.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
