"""The errors that end training on purpose. ``python -m trainer`` turns each of them into an exit code.

Those of :mod:`opt_ops.contract.errors` are three more; ``UserError`` is the one that most modules raise.
"""

from opt_ops.contract.errors import UserError

__all__ = ["CorruptionError", "LossScaleError", "NonFiniteError", "PeerCorruptionError", "UserError"]


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm is not finite. The update was not applied. Exit code 82."""


class CorruptionError(Exception):
    """Checksums show that the data of this rank is corrupt. The update was not applied. Exit code 85."""


class PeerCorruptionError(Exception):
    """Checksums show that the data of another rank is corrupt. The update was not applied. Exit code 87."""


class LossScaleError(ArithmeticError):
    """The loss scale of fp16 is at its floor, and all updates overflow. Exit code 86."""
