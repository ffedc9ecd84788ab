"""What tests of several folders share."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fake_nvml.build import build

settings.register_profile("no clock", deadline=None)  # a loaded machine is slow, and that is no failure
settings.load_profile("no clock")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background commands ignore it, all they start too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (-n 4 --dist loadfile), those on a Slurm come first: they take longest, and mostly wait."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake NVIDIA driver library, compiled once."""
    try:
        return build(tmp_path_factory.mktemp("nvml"))
    except RuntimeError as error:
        pytest.skip(str(error))
