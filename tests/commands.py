"""``opt-ops`` as a process of its own, forked from one that has imported its modules: that costs a tenth of a start.

Tests of what happens before the first line of a command (an interpreter's start, its streams, its settings in the
environment) start an interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.forks import Forks

_SECONDS = 240
_FORKS = Forks("tests.imported_commands")


def opt_ops(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder. With variables of its own, it is a new interpreter."""
    if not environment:
        forked = _FORKS.run("opt_ops", arguments, folder, os.environ)
        out, err = forked.communicate(_SECONDS)
        return subprocess.CompletedProcess(forked.args, forked.returncode or 0, out, err)
    return subprocess.run(
        [sys.executable, "-m", "opt_ops", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=_SECONDS,
    )
