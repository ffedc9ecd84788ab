"""The errors that people see: what, why, what next, and the exit code of the command.

OptOpsError          1  the operation failed
├─ UsageError        2  the command line or the configuration cannot be right
├─ NotFound          3  there is no such lineage, run, node, file
├─ Refused           4  a precondition or a policy forbids it, or a confirmation is missing
└─ Unavailable      75  something that should answer does not; trying again may help
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
    """The command line or the configuration cannot be right."""

    exit_code = 2


class NotFound(OptOpsError):
    """There is no such thing."""

    exit_code = 3


class Refused(OptOpsError):
    """A precondition or a policy forbids it, or a confirmation is missing."""

    exit_code = 4


class Unavailable(OptOpsError):
    """Something that should answer does not."""

    exit_code = 75


class SchedulerUnavailable(Unavailable):
    """The scheduler does not answer. Nothing follows from that: what was, is still assumed to be."""


class NotYet(SchedulerUnavailable):
    """The scheduler is being asked, and the answer will come: ask again."""


class NotDelivered(Unavailable):
    """An alert did not reach everybody whom it should."""
