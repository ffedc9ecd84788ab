"""The command ``python -m trainer.tokens``. Its code is in :mod:`trainer.data.tokens`."""
