"""Packages that the base installation does not bring: which extra has them, and whether the trainer can start."""

from __future__ import annotations

import json
import os
import subprocess

from opt_ops.cli.shared import trainer_probe
from opt_ops.config import TrainerCommand, is_installed
from opt_ops.errors import Unavailable

_PROBE_SECONDS = 20.0  # a network file system may need as long to find a package


def require(module: str, name: str, extra: str) -> None:
    """Check that a package is installed.

    Args:
        module: What is imported.
        name: What people call it.
        extra: The extra of opt-ops that installs it.

    Raises:
        Unavailable: it is not installed; the hint installs it.
    """
    if not is_installed(module):
        raise Unavailable(f"{name} is not installed", f"pip install 'opt-ops[{extra}]'")


def require_trainer(trainer: TrainerCommand) -> None:
    """Check that the trainer's command can start, as far as this machine can tell.

    Raises:
        Unavailable: the command is `python -m trainer`, and that Python finds another distribution's `trainer`, none,
            or no torch.
    """
    if problem := trainer_problem(trainer):
        raise Unavailable(*problem)


def trainer_problem(trainer: TrainerCommand) -> tuple[str, str] | None:
    """What is wrong with `python -m trainer`, and what to do. None: nothing, or it is another command, or unknown."""
    if trainer.python is None:
        return None
    run = f"import runpy; runpy.run_path({trainer_probe.__file__!r}, run_name='__main__')"
    try:
        done = subprocess.run(
            [*trainer.python, "-c", run],
            env={**os.environ, **trainer.environment},
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=True,
        )
        found = json.loads(done.stdout)
        python, place, owner = found["python"], found["place"], found["owner"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None  # a wrapper that starts no Python here, such as a container on the nodes only
    if place is None:
        return f"{python} finds no package `trainer`", f"{python} -m pip install 'opt-ops[trainer]'"
    if not found["ours"]:
        return _foreign(python, place, owner)
    if not found["torch"]:
        return f"torch is not installed for {python}", f"{python} -m pip install 'opt-ops[trainer]'"
    return None


def _foreign(python: str, place: str, owner: str | None) -> tuple[str, str]:
    if owner is None:
        source, remedy = (
            "no distribution owns it",
            "rename it, or name your own trainer by its path in [trainer] command",
        )
    else:
        source = f"distribution {owner}"
        pip = f"{python} -m pip"
        remedy = f"{pip} uninstall {owner.split()[0]}, then {pip} install --force-reinstall --no-deps opt-ops"
    return f"`python -m trainer` starts {place} ({source}), not the trainer of opt-ops", remedy
