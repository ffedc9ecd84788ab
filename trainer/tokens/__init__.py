"""The command ``python -m trainer.tokens``; its parts are in :mod:`trainer.data.tokens`."""
