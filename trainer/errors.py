"""The errors that end training on purpose. ``python -m trainer`` turns each of them into an exit code.

:class:`opt_ops.contract.manifest.CheckpointError` and :class:`opt_ops.contract.fence.SupersededError` are two more.
"""


class UserError(ValueError):
    """A recipe, setting, path or layout cannot work. A retry would fail in the same way. Exit code 78.

    The user sees only the message. It says what is wrong, why, and what to do next.
    """


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm is not finite. The update was not applied. Exit code 82."""


class CorruptionError(Exception):
    """Checksums show that the data of this rank is corrupt. The update was not applied. Exit code 85."""


class PeerCorruptionError(Exception):
    """Checksums show that the data of another rank is corrupt. The update was not applied. Exit code 87."""


class LossScaleError(ArithmeticError):
    """The loss scale of fp16 is at its floor, and all updates overflow. Exit code 86."""
