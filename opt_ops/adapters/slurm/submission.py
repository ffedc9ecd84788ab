"""Submits a job through submitit: what opt-ops.toml says is asked of sbatch, whatever the daemon's shell says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ops.adapters.slurm.command import ask, settings_of_users
from opt_ops.errors import Refused, SchedulerUnavailable

if TYPE_CHECKING:
    from submitit import SlurmExecutor

NOTICE_SECONDS = 120  # from the notice to the time limit

# sbatch reports that a job can never run. Another try would not help.
_REFUSALS = (
    "Invalid",
    "invalid",
    "not permitted",
    "violates",
    "exceed",
    "Requested node configuration",
    "Unrecognized",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """How this site asks Slurm for nodes."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_minutes: int = 72 * 60
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    exclusive: bool = False
    additional: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _executor(folder: Path) -> SlurmExecutor:
    """Runs sbatch without the settings of the daemon's shell: `SBATCH_*` outranks the lines of the script."""
    import submitit

    class Executor(submitit.SlurmExecutor):
        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            without = [part for name in settings_of_users(os.environ) for part in ("-u", name)]
            return ["env", *without, "sbatch", str(submission_file_path)]

    return Executor(folder / "slurm")


def submit(
    folder: Path,
    options: SlurmOptions,
    agent: Callable[[list[str]], None],
    names: tuple[str, str, str],
    nodes: int,
    exclude: Sequence[str],
) -> str:
    """Submit a job that runs `agent` on each of `nodes` nodes. Returns its number.

    Args:
        folder: Of the lineage.
        options: What the site says.
        agent: Called on each node with its command line.
        names: Of the allocation, of the job, and the comment that tells the job from those of other folders.
        nodes: How many.
        exclude: Nodes that the job must not get.

    Raises:
        Refused: sbatch refused the job.
        SchedulerUnavailable: sbatch or srun failed: it is not known whether there is a job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    allocation, job_name, comment = names
    try:
        executor = _executor(folder)
    except RuntimeError as error:
        raise SchedulerUnavailable(
            f"srun is not on the PATH: {error}", "load the Slurm environment, then opt-ops doctor"
        ) from error
    parameters = {
        "job_name": job_name,
        "comment": comment,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time_minutes,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": options.cpus_per_task,
        "gpus_per_node": options.gpus_per_node,
        "exclude": ",".join(_known(exclude)) or None,
        "exclusive": options.exclusive or None,
        # The loss of a node must not end the job, or the step in which the agents run.
        "additional_parameters": {**options.additional, "no_kill": True, "no_requeue": True},
        "srun_args": ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"],
        # Agents get notice of the end and let their ranks save, even while no daemon runs.
        "signal_delay_s": NOTICE_SECONDS,
    }
    try:
        executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
        return executor.submit(agent, ["--folder", str(folder), "--allocation", allocation]).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        if any(word in str(error) for word in _REFUSALS):
            raise Refused(
                f"sbatch refused the job: {error}", "correct [slurm] in opt-ops.toml, then opt-ops doctor"
            ) from error
        raise SchedulerUnavailable(f"sbatch failed: {error}", "scontrol ping says whether slurmctld answers") from error
    except OSError as error:  # no process is left, or the disk is full
        raise SchedulerUnavailable(f"sbatch could not be run: {error}") from error


def _known(nodes: Sequence[str]) -> list[str]:
    """The nodes that Slurm knows. It refuses a job that excludes an unknown node, and nodes do leave clusters."""
    if not nodes:
        return []
    there = set(ask("sinfo", "-a", "-h", "-N", "-o", "%N"))
    return [node for node in nodes if node in there]
