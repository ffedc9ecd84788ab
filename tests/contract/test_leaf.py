"""Any trainer can import the contract: it needs the standard library and nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CONTRACT = REPOSITORY / "opt_ops" / "contract"
MODULES = sorted(CONTRACT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CONTRACT)))
def test_it_imports_the_standard_library_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            inside = name == "opt_ops.contract" or name.startswith("opt_ops.contract.")
            assert inside or name.partition(".")[0] in sys.stdlib_module_names, name


def test_importing_it_imports_nothing_else_of_the_package() -> None:
    modules = ", ".join(str(path.relative_to(REPOSITORY).with_suffix("")).replace("/", ".") for path in MODULES)
    program = f"import sys, {modules}; print(sorted(m for m in sys.modules if m.startswith(('opt_ops', 'trainer'))))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("opt_ops.") for name in ast.literal_eval(done.stdout)}
    assert {name.partition(".")[0] for name in loaded} == {"opt_ops", "contract"}
