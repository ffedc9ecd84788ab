"""The exit codes, as docs/formats.md lists them for other trainers."""

import re
from pathlib import Path

import pytest

from opt_ops.contract.exit_codes import ExitCode

FORMATS = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.mark.parametrize("code", ExitCode)
def test_each_exit_code_is_documented(code: ExitCode) -> None:
    assert re.search(rf"^\| {int(code)} \|", FORMATS.read_text(encoding="utf-8"), re.MULTILINE)
