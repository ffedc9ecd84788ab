"""What tests of several folders share."""

from pathlib import Path

import pytest

from tests.fake_nvml.build import build

_NODES_AND_RANKS = ("test_failures.py", "test_node_failures.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (-n 4 --dist loadgroup), a file's tests stay together, and those on a Slurm are two halves, with a
    cluster each. These come first: they take longest, and mostly wait.
    """
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
    for item in items:
        group = item.path.name
        if item.get_closest_marker("slurm"):
            group = "slurm, nodes and ranks" if group in _NODES_AND_RANKS else "slurm, the rest"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake NVIDIA driver library, compiled once."""
    try:
        return build(tmp_path_factory.mktemp("nvml"))
    except RuntimeError as error:
        pytest.skip(str(error))
