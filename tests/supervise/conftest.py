"""What several tests of the supervisor share."""

import pytest


@pytest.fixture
def draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections start a program that draws nothing."""
    monkeypatch.setattr("opt_ops.supervise.projections.sys.executable", "/bin/true")
