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
    MemoryError: ExitCode.OUT_OF_MEMORY,
}


def exit_code(error: BaseException) -> ExitCode:
    """The code with which a rank ends because of ``error``: 1 for an error that no other code covers.

    Memory may be that of the process or of a GPU. PyTorch's errors are known by their names.
    """
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), ExitCode.UNEXPECTED_ERROR)
    return ExitCode.OUT_OF_MEMORY if _is_torch_out_of_memory(error) else code


def _is_torch_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    # The allocator for the memory of the process has no error class of its own.
    names = [kind.__name__ for kind in type(error).__mro__]
    return "OutOfMemoryError" in names or "DefaultCPUAllocator: " in str(error)
