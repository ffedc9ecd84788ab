"""The fixtures of this room."""

from tests.watch_job.watched import folder, slurm

__all__ = ["folder", "slurm"]
