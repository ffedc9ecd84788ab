"""What several tests of the supervisor share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from opt_ops.supervise.projections import Projection


@pytest.fixture
def draws_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Projections start a program that draws nothing. It is waited for: Python warns a later test of it otherwise."""
    monkeypatch.setattr("opt_ops.supervise.projections.sys.executable", "/bin/true")
    start, started = Projection._start, []

    def noted(self: Projection) -> None:
        start(self)
        started.append(self.process)

    monkeypatch.setattr(Projection, "_start", noted)
    yield
    for process in filter(None, started):
        process.wait()
