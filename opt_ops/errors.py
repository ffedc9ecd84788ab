"""The errors that people see: what happened, why, what to do next, and the exit code of the command.

OptOpsError          1  the operation failed
├─ UsageError        2  the command line or the configuration is wrong
├─ NotFound          3  there is no such lineage, run, node, file
├─ Refused           4  a precondition or a policy forbids it, or it was not confirmed
└─ Unavailable      75  something does not answer, is not running or is not installed
   ├─ SchedulerUnavailable
   │  └─ NotYet
   └─ NotDelivered
"""

from __future__ import annotations


class OptOpsError(Exception):
    """Base of all errors with a message for the reader.

    Args:
        message: What went wrong, and why.
        hint: What to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(OptOpsError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class NotFound(OptOpsError):
    """There is no such lineage, run, node or file."""

    exit_code = 3


class Refused(OptOpsError):
    """A precondition or a policy forbids it, or the operator did not confirm it."""

    exit_code = 4


class Unavailable(OptOpsError):
    """Something does not answer, is not running or is not installed."""

    exit_code = 75


class SchedulerUnavailable(Unavailable):
    """The scheduler does not answer. That proves nothing: the last known state is still assumed."""


class NotYet(SchedulerUnavailable):
    """A query to the scheduler is running; its answer comes with a later call."""


class NotDelivered(Unavailable):
    """An alert was not delivered to every URL."""
