"""What tests of several folders share; and that a run depends on nothing before it, and leaves nothing behind it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, settings

from tests import processes, watchdog
from tests.fake_nvml.build import build
from tests.slurm import cluster

# A script's background commands ignore SIGINT, and all that they start does. SIGTERM shall clean up as Ctrl-C does.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)

_WATCHDOG = pytest.StashKey[IO[bytes]]()

# Same examples in every run, however slow the machine is. `make soak` looks for others.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=2000)
settings.load_profile("same")

# What users set for themselves reaches no test: settings of programs under test, of their job, of their terminal.
_FOREIGN = (
    *("OPT_OPS_", "MLFLOW_", "SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_"),
    *("NCCL_", "TORCH_", "TORCHINDUCTOR_", "OMP_", "MASTER_", "LOCAL_", "XDG_", "LC_"),
)
_FOREIGN_NAMES = {
    *("RANK", "WORLD_SIZE", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TZ"),
    *("COMP_WORDS", "COMP_CWORD", "_TYPER_COMPLETE_ARGS", "PYTHONWARNINGS", "DISPLAY"),
    "PYTHONDONTWRITEBYTECODE",  # hundreds of processes would compile all modules again, and each worker all tests
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Mark the run, before it starts any process; workers of pytest-xdist belong to their controller's."""
    for name in list(os.environ):
        if name != processes.MARK and (name.startswith(_FOREIGN) or name in _FOREIGN_NAMES):
            del os.environ[name]
    sys.dont_write_bytecode = False
    os.environ["LC_ALL"] = "C.UTF-8"
    for library in ("OPENBLAS", "OMP"):  # tests run side by side, and threads wait for each other by spinning
        os.environ[f"{library}_NUM_THREADS"] = "1"
    if not hasattr(config, "workerinput"):
        processes.mark()
        processes.end_orphans()
        config.stash[_WATCHDOG] = watchdog.start(os.environ[processes.MARK])


def pytest_unconfigure(config: pytest.Config) -> None:
    """However the run ends, nothing of it goes on."""
    if hasattr(config, "workerinput"):
        return
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C
    processes.end_mine()
    for folder in cluster.folders():
        if (run := cluster.run_of(folder)) is not None and (run == os.getpid() or not processes.name(run)):
            cluster.down(folder)
    if (pipe := config.stash.get(_WATCHDOG, None)) is not None:
        pipe.close()
    signal.signal(signal.SIGINT, was)


_SECONDS = {"slurm": 60, "slow": 60}  # of a test, by its marker, as they were measured; of another in tests/e2e: 12
_COMPUTES = (
    *("tests/trainer/", "tests/kernels/", "tests/integrations/", "tests/trainer_check/", "tests/test_gpu_all.py"),
    *("tests/chronicles/mlflow_mirror/", "tests/chronicles/logbook/test_browser.py"),  # each starts servers
)


def _seconds(items: list[pytest.Item]) -> int:
    """About how long a file of tests that wait takes."""
    return sum(next((each for name, each in _SECONDS.items() if item.get_closest_marker(name)), 12) for item in items)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side (-n 4 --dist loadfile), long files come first: one that waits, and one that computes, in turn.

    Workers take the files in this order. If those on a Slurm came together, the processors would wait with them. Of
    those that wait, the longest come first, so that at the end no worker has a long one alone.
    """
    if elsewhere := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"another name in each worker, so none would run; give ids: {elsewhere}")
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waits, computes, short = [], [], []
    for path, its in files.items():
        name = path.relative_to(Path(__file__).parents[1]).as_posix()
        if any(item.get_closest_marker("slurm") for item in its) or name.startswith("tests/e2e/"):
            waits.append(its)
        else:
            (computes if name.startswith(_COMPUTES) else short).append(its)
    waits.sort(key=_seconds, reverse=True)
    turns = [its for pair in zip_longest(waits, computes, fillvalue=[]) for its in pair]
    items[:] = [item for its in (*turns, *short) for item in its]


@pytest.fixture(autouse=True)
def _configuration_of_no_other_test() -> Iterator[None]:
    """A command that a test runs in its own process leaves no `-c FILE` to the next test."""
    yield
    if (options := sys.modules.get("opt_ops.cli.shared.options")) is not None:
        options.settings.config_path, options.settings.debug = None, False


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The trainer's cache of data, which is the user's otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPT_OPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake NVIDIA driver library, compiled once."""
    try:
        return build(tmp_path_factory.mktemp("nvml"))
    except RuntimeError as error:
        pytest.skip(str(error))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the marker ``gpu`` run where there is one."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU here")
