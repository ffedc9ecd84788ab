"""Prints as JSON what `python -m trainer` would start. The Python of the trainer's command runs this file.

Standard library only, and nothing of opt-ops: that Python may have neither.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

MARKER = '__distribution__ = "opt-ops"'  # a line of trainer/__init__.py


def main() -> None:
    """Find the package `trainer`, the distribution that installed it, and torch."""
    spec = find_spec("trainer")
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    place = next((Path(each) for each in places if each), None)
    ours = place is not None and place.is_file() and MARKER in place.read_text(encoding="utf-8", errors="replace")
    found = {
        "python": sys.executable,
        "place": str(place) if place else None,
        "ours": ours,
        "owner": _owner(place) if place and not ours else None,
        "torch": _is_installed("torch"),
    }
    print(json.dumps(found))


def _owner(place: Path) -> str | None:
    """The distribution that installed the package, such as `trainer 0.0.36`."""
    folder = place.parent if place.name == "__init__.py" else place
    for name in metadata.packages_distributions().get("trainer", []):
        distribution = metadata.distribution(name)
        if name != "opt-ops" and Path(str(distribution.locate_file(folder.name))).resolve() == folder.resolve():
            return f"{name} {distribution.version}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


if __name__ == "__main__":
    main()
