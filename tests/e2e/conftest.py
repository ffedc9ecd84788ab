"""The fixture `site`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site on this machine with a stub trainer: three local nodes, two of them in use."""
    site = Site(tmp_path)
    yield site
    site.close()
