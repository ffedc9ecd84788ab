from collections.abc import Iterator

import pytest

from tests.kernels import harness


@pytest.fixture(scope="module", autouse=True)
def _child() -> Iterator[None]:
    """The interpreter's process ends with the last test of a file."""
    yield
    harness.close()
