"""Slurm: submitit submits a job that holds the nodes and runs an agent on each; squeue, sacct and sinfo report on it.

Only text with explicit columns is read, because Slurm's JSON changes between releases. A command that fails or does not
answer means *unknown*, never gone. Only the supervisor restarts anything: Slurm and submitit must not requeue.

    scheduler.py    the port: what the supervisor asks for
    questions.py    every question runs in a thread of its own; the loop takes the newest answer, with its age
    answers.py      what squeue, sacct and sinfo say of a job and of its nodes
    states.py       the tables: each word of Slurm, and what it means for us
    submission.py   sbatch, through submitit
    command.py      runs one command of Slurm, in an environment that the user's settings do not reach
"""

from opt_ops.adapters.slurm.answers import nodes_by_state
from opt_ops.adapters.slurm.scheduler import SlurmScheduler
from opt_ops.adapters.slurm.submission import SlurmOptions

__all__ = ["SlurmOptions", "SlurmScheduler", "nodes_by_state"]
