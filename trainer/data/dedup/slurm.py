"""datatrove's tasks as jobs of Slurm: hand them in, wait for them, do those again that ended without a result.

A job is known by its name, which is made from the folder: so a command that was interrupted, even between sbatch and
the job's number, finds its jobs again and waits for them.
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from trainer.data.dedup.processes import ATTEMPTS
from trainer.data.dedup.work import Work
from trainer.errors import UserError

_LINES_SHOWN = 12
_WITH_DEFAULTS = ("partition", "time")
_LONGEST_PAUSE = 10.0  # seconds between two questions to Slurm


class Executor(SlurmPipelineExecutor):
    """datatrove's, without what does not fit here."""

    def launch_merge_stats(self) -> None:
        """No job for it: after a task that failed it would wait in the queue forever."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Without what nobody asked for, so that Slurm's defaults hold, and for folders with a blank in their names."""
        found = super().get_sbatch_args(max_array)
        found = {name: value for name, value in found.items() if value or name not in _WITH_DEFAULTS}
        found |= {name: f'"{found[name]}"' for name in ("output", "error")}
        if "mem" in found:
            del found["mem-per-cpu"]  # sbatch refuses both
        return found


def run_jobs(work: Work, stage: str, step: PipelineStep, log: str, tasks: int, tasks_per_job: int) -> None:
    """Run all tasks of a stage that have no result yet, and wait for them.

    Raises:
        UserError: sbatch refused a job.
        ChildProcessError: a task ended without a result, again and again. The last lines of its log are in it.
    """
    logger.disable("datatrove")  # of this process; tasks have logs of their own
    name = f"dedup-{stage}-{hashlib.sha256(log.encode()).hexdigest()[:12]}"
    for attempt in range(ATTEMPTS + 1):
        executor = _executor(work, step, log, name, tasks, tasks_per_job)
        _wait(work, stage, name, executor)
        left = executor.get_incomplete_ranks()
        if not left:
            return
        if attempt:
            told = f"{stage}: {len(left)} of {tasks} tasks ended without a result"
            shown = f"{told}. The log of task {left[0]}:\n{_log_of(Path(log), left[0], tasks_per_job)}"
            if attempt == ATTEMPTS:
                raise ChildProcessError(f"{shown}\nThey were tried {ATTEMPTS} times, and logs are in {log}/slurm_logs")
            work.progress(f"{shown}\nThey are done again")
        try:
            executor.launch_job()  # run() takes a command given inside a job for a task of its own
        except subprocess.CalledProcessError as error:
            raise UserError(f"sbatch refused the job ({error.returncode}). What it said is above.") from None
        except OSError as error:
            raise UserError(f"sbatch cannot be started: {error}. Is this a machine from which jobs start?") from error
        job = executor.job_id
        work.progress(f"{stage}: job {job} for {len(left)} tasks. Ctrl-C leaves it alone; then `scancel {job}` ends it")


def _executor(work: Work, step: PipelineStep, log: str, name: str, tasks: int, tasks_per_job: int) -> Executor:
    options = dict(work.options.slurm or {})
    python = shlex.quote(sys.executable)
    pickled = shlex.quote(f"{log}/executor.pik")
    return Executor(
        [step],
        tasks,
        time=options.pop("time", ""),
        partition=options.pop("partition", ""),
        workers=work.options.workers or -1,
        job_name=name,
        qos="",
        # datatrove starts a program by its name, with a path that a blank would cut in two
        env_command=f"launch_pickled_pipeline() {{ {python} -m datatrove.tools.launch_pickled_pipeline {pickled}; }}",
        sbatch_args=options,
        logging_dir=log,
        with_srun=False,
        tasks_per_job=tasks_per_job,
    )


def _wait(work: Work, stage: str, name: str, executor: Executor) -> None:
    """Wait until Slurm knows no job of that name."""
    told, pause = "", 0.5
    while (line := _queued(name)) is not None:
        done = executor.tasks - len(executor.get_incomplete_ranks())
        line = f"{stage}: {done} of {executor.tasks} tasks done; {line}"
        if line != told:
            work.progress(line)
        told = line
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 1.2)


def _queued(name: str) -> str | None:
    """How many jobs run and wait, in words; None when there are none."""
    try:
        asked = _squeue(name)
    except subprocess.TimeoutExpired:
        return "squeue does not answer, and is asked again"
    if asked.returncode:
        return f"squeue failed, and is asked again: {asked.stderr.strip()}"
    found = Counter(tuple(line.split(" ", 1)) for line in asked.stdout.splitlines())
    return (
        ", ".join(
            f"{number} {state.lower()}" + (f" ({reason})" if state == "PENDING" and reason != "None" else "")
            for (state, reason), number in sorted(found.items())
        )
        or None
    )


def require_slurm() -> None:
    """Check once that Slurm answers. Later it may be away for a while, and is waited for.

    Raises:
        UserError: it does not.
    """
    try:
        asked = _squeue("none")
        why = asked.stderr.strip() if asked.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        raise UserError(f"squeue failed: {why}. Give the command where jobs start, and when Slurm answers.")


def _squeue(name: str) -> "subprocess.CompletedProcess[str]":
    command = ["squeue", "--me", "-h", "-r", "-n", name, "-o", "%T %r"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def _log_of(log: Path, rank: int, tasks_per_job: int) -> str:
    """The last lines of the newest log of the job that had this task."""
    ranks = json.loads((log / "ranks_to_run.json").read_text())
    index = ranks.index(rank) // tasks_per_job if rank in ranks else 0
    found = sorted((log / "slurm_logs").glob(f"*_{index}.out"), key=lambda path: path.stat().st_mtime)
    if not found:
        return "  (none: the job did not begin)"
    lines = found[-1].read_text(errors="replace").splitlines()[-_LINES_SHOWN:]
    return "\n".join([f"  {found[-1]}:", *(f"  {line}" for line in lines)])
