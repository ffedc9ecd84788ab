"""Fixtures of the tests of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from tests.integrations.hf_runs import make_room

    return make_room(tmp_path, monkeypatch)
