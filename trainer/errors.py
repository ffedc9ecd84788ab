"""The errors that end training on purpose. ``python -m trainer`` turns each of them into an exit code.

The contract has four more (:mod:`opt_ops.contract.errors`). ``UserError`` is the one that most modules raise.
"""

from opt_ops.contract import errors
from opt_ops.contract.errors import NotFiniteError, UserError
from opt_ops.contract.exit_codes import ExitCode

__all__ = [
    "CorruptionError",
    "LossScaleError",
    "NoCommonStepError",
    "NotFiniteError",
    "PeerCorruptionError",
    "UserError",
    "exit_code",
]


class CorruptionError(Exception):
    """Checksums show that the data of this rank is corrupt. The update was not applied. Exit code 85."""


class PeerCorruptionError(Exception):
    """Checksums show that the data of another rank is corrupt. The update was not applied. Exit code 87."""


class LossScaleError(ArithmeticError):
    """The loss scale of fp16 is at its floor, and all updates overflow. Exit code 86."""


class NoCommonStepError(Exception):
    """Ranks were lost, and there is no step whose state all places hold. The checkpoints are whole. Exit code 88."""


_CODES: dict[type[BaseException], ExitCode] = {
    CorruptionError: ExitCode.CORRUPT_DATA,
    LossScaleError: ExitCode.LOSS_SCALE_FLOOR,
    NoCommonStepError: ExitCode.NO_COMMON_STEP,
    PeerCorruptionError: ExitCode.PEER_CORRUPT_DATA,
}


def exit_code(error: BaseException) -> ExitCode:
    """The code with which a rank ends because of ``error``: 1 for an error that no other code covers."""
    return _CODES.get(type(error)) or errors.exit_code(error)
