"""The core imports the standard library only, and of that nothing that reads a clock, a file or a random number."""

import ast
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "opt_ops" / "core"
CONTRACT = {
    "opt_ops.contract.data_since",  # the name of a capability
    "opt_ops.contract.exit_codes",  # the trainer's exit codes: numbers and names
    "opt_ops.contract.replacing",  # which rank keeps whose copy
}
IMPURE = {"time", "os", "pathlib", "random", "logging", "socket", "subprocess", "threading", "io", "tempfile", "uuid"}


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_is_pure(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            root = name.partition(".")[0]
            ours = name.startswith("opt_ops.core") or name in CONTRACT
            assert ours or root in sys.stdlib_module_names, f"{path.name} imports {name}"
            assert root not in IMPURE, f"{path.name} imports {name}"
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in ("open", "print", "datetime.now", "input"), f"{path.name} calls {name}"
