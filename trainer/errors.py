"""What can end a training run on purpose. ``python -m trainer`` turns each into its exit code."""


class UserError(ValueError):
    """A recipe, setting, path or layout that cannot work; trying again is of no use. Exit code 78.

    The message says what is wrong, why, and what to do next: it is all that the user sees.
    """


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm is not finite, and the update was not applied. Exit code 82."""


class CorruptionError(Exception):
    """The checksums say that this rank's data is corrupt, and the update was not applied. Exit code 85."""


class PeerCorruptionError(Exception):
    """The checksums say that another rank's data is corrupt, and the update was not applied. Exit code 87."""


class LossScaleError(ArithmeticError):
    """fp16's loss scale is stuck at its floor: no update is applied any more. Exit code 86."""


class SupersededError(Exception):
    """A newer attempt of the lineage exists: this one must not write any more. Exit code 83."""
