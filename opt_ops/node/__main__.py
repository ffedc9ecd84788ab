"""`python -m opt_ops.node agent|readings|host|burn-in`: the one entry for everything that runs on a node.

The four commands must stay when modules move. After an upgrade, a running agent still starts its reader by them.
"""

from __future__ import annotations

import importlib
import sys

_MODULES = {"agent": "agent", "readings": "nvml", "host": "host", "burn-in": "burn_in"}


def main() -> None:
    """Run the command named by the first argument, with the other arguments."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in _MODULES:
        sys.exit(f"python -m opt_ops.node: {word!r} is not a command; use one of {', '.join(_MODULES)}")
    del sys.argv[1]
    importlib.import_module(f"opt_ops.node.{_MODULES[word]}").main()


if __name__ == "__main__":
    main()
