"""The exit codes of a trainer, by which the supervisor knows why a rank ended, and two more of evaluations."""

from enum import IntEnum

EVALUATION_HANGS = 124
"""An evaluation ran longer than it may, as timeout(1) has it."""

EVALUATION_NOT_STARTED = 126
"""An evaluation could not be started, as shells have it."""


class ExitCode(IntEnum):
    """How a rank ended. A rank that a signal stopped ends with 128 + the signal's number instead."""

    DONE = 0
    """All steps are done."""

    UNEXPECTED_ERROR = 1
    """An error that no other code covers. The rank's log has the traceback."""

    CHECKPOINT_REFUSED = 65
    """The checkpoint to resume from is missing, torn or damaged."""

    USER_ERROR = 78
    """A recipe, setting, path or layout cannot work. A retry would fail in the same way."""

    NOT_FINITE = 82
    """The loss or the gradient norm is not finite. The update was not applied."""

    SUPERSEDED = 83
    """The fence names a newer attempt. This attempt wrote no checkpoint after that."""

    OUT_OF_MEMORY = 84
    """The GPU or the process ran out of memory."""

    CORRUPT_DATA = 85
    """Checksums show that the data of this rank is corrupt. The update was not applied."""

    LOSS_SCALE_FLOOR = 86
    """The loss scale of fp16 is at its floor, and updates still overflow."""

    PEER_CORRUPT_DATA = 87
    """Checksums show that the data of another rank is corrupt. That rank ends with 85."""

    NO_COMMON_STEP = 88
    """Ranks were lost, and no step is left whose state all places hold. The checkpoints on disk are whole."""
