"""Runs one command of Slurm, in an environment that the settings of the daemon's shell do not reach."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from opt_ops.errors import SchedulerUnavailable

TIMEOUT_SECONDS = 20.0

# Slurm's commands read settings from variables with these first letters, and those outrank what a script asks for.
_SETTINGS = (
    *("SBATCH_", "SLURM_", "SLURMD_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SACCTMGR_", "SINFO_", "SCANCEL_"),
    *("SCONTROL_", "SSTAT_", "SPRIO_", "SSHARE_", "SREPORT_", "SATTACH_", "SBCAST_", "SCRONTAB_", "SDIAG_"),
)

# What leads the commands to the cluster, and lets them in.
_OF_THE_CLUSTER = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"})


def settings_of_users(environment: Mapping[str, str]) -> list[str]:
    """The variables that would change what Slurm's commands do."""
    return sorted(name for name in environment if name.startswith(_SETTINGS) and name not in _OF_THE_CLUSTER)


def environment() -> dict[str, str]:
    """The environment of a question: times come as seconds since the epoch, and messages in English."""
    foreign = set(settings_of_users(os.environ))
    ours = {name: value for name, value in os.environ.items() if name not in foreign}
    return {**ours, "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}


def ask(*command: str, may_fail: str = "", seconds: float | None = None) -> list[str]:
    """Run a command of Slurm. Returns its lines; none if it fails with the message `may_fail`.

    Raises:
        SchedulerUnavailable: it could not be started, failed with another message, or did not answer in
            `seconds` (default: `TIMEOUT_SECONDS`).
    """
    patience = TIMEOUT_SECONDS if seconds is None else seconds
    try:
        done = subprocess.run(
            command,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=patience,
            check=False,
        )
    except FileNotFoundError as error:
        raise SchedulerUnavailable(
            f"{command[0]} is not on the PATH", "load the Slurm environment, then opt-ops doctor"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerUnavailable(f"{command[0]} did not answer in {patience:g} s") from error
    except (OSError, ValueError) as error:  # no process or memory is left; an argument with a NUL, which Slurm gave us
        raise SchedulerUnavailable(f"{command[0]} could not be started: {error}") from error
    if done.returncode != 0:
        if may_fail and may_fail in done.stderr:
            return []
        raise SchedulerUnavailable(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return [line for line in done.stdout.splitlines() if line]
