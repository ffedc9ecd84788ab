"""The fixtures `site`, and `trained_site` for tests that only read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import QUICK_HANG, QUICK_SILENCE, Site
from tests.e2e.trained import shared_folder, trained


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site on this machine with a stub trainer: three local nodes, two of them in use."""
    name = request.node.name
    site = Site(tmp_path, **(QUICK_HANG if "hang" in name else QUICK_SILENCE if "silent" in name else {}))
    yield site
    site.close()


@pytest.fixture(scope="session")
def trained_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The site of `tests.e2e.trained`, which nobody changes."""
    return trained(shared_folder(tmp_path_factory.getbasetemp()))
