"""The fixture `site`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import QUICK_HANG, QUICK_SILENCE, Site


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site on this machine with a stub trainer: three local nodes, two of them in use."""
    name = request.node.name
    site = Site(tmp_path, **(QUICK_HANG if "hang" in name else QUICK_SILENCE if "silent" in name else {}))
    yield site
    site.close()
