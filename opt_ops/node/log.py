"""Log lines of a node agent: all with one prefix, on standard error, where the scheduler keeps them."""

import sys

PREFIX = "opt-ops agent:"


def log(text: str) -> None:
    """Write one line."""
    print(PREFIX, text, file=sys.stderr, flush=True)
