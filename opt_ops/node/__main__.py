"""`python -m opt_ops.node agent|readings|burn-in`: the one entry of everything that a node runs.

These words stay when modules move: an agent that is running starts its reader by them again after an upgrade.
"""

from __future__ import annotations

import importlib
import sys

_MODULES = {"agent": "agent", "readings": "nvml", "burn-in": "burn_in"}


def main() -> None:
    """Run the command that the first word names, with the other words as its arguments."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in _MODULES:
        sys.exit(f"python -m opt_ops.node: {word!r} is no command; use one of {', '.join(_MODULES)}")
    del sys.argv[1]
    importlib.import_module(f"opt_ops.node.{_MODULES[word]}").main()


if __name__ == "__main__":
    main()
