"""What tests of several folders share."""

from pathlib import Path

import pytest

from tests.fake_nvml.build import build


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (-n 3 --dist loadgroup), the tests of a file stay together, and so do all those on the one Slurm.
    These come first: they take longest, and mostly wait.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        group = "slurm" if item.get_closest_marker("slurm") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake NVIDIA driver library, compiled once."""
    try:
        return build(tmp_path_factory.mktemp("nvml"))
    except RuntimeError as error:
        pytest.skip(str(error))
