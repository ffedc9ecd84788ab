"""Errors that end a rank on purpose, and the exit code of each."""

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.fence import SupersededError
from opt_ops.contract.manifest import CheckpointError


class UserError(ValueError):
    """An option, a setting, a path or a layout cannot work. A retry would fail in the same way. Exit code 78.

    The user sees only the message. It says what is wrong, why, and what to do next.
    """


class NotFiniteError(ArithmeticError):
    """The loss or the gradient norm is not finite. The update was not applied. Exit code 82."""


_CODES: dict[type[BaseException], ExitCode] = {
    UserError: ExitCode.USER_ERROR,
    CheckpointError: ExitCode.CHECKPOINT_REFUSED,
    NotFiniteError: ExitCode.NOT_FINITE,
    SupersededError: ExitCode.SUPERSEDED,
}


def exit_code(error: BaseException) -> ExitCode:
    """The code with which a rank ends because of ``error``: 1 for an error that is not one of the contract's."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), ExitCode.UNEXPECTED_ERROR)
