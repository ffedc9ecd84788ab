"""What each test file costs: `pytest -p tests.cost ...` prints CPU seconds at the end, most expensive first.

CPU seconds are those of the test process and of all below it; a daemon that has left its parent is not counted. Unlike
durations, they hardly depend on what else the machine does. A fixture of a session or a module counts for the first
test that asks for it. With ``--cost-of-tests``, each test has a line.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

_BEFORE = pytest.StashKey[float]()
_ROWS: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])  # CPU seconds, seconds, tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cost-of-tests", action="store_true", help="CPU seconds of each test, not of each file")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_BEFORE] = 0.0


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported counts for no test."""
    session.config.stash[_BEFORE] = _cpu()


def _cpu() -> float:
    """Of this process and all below it: their own, and of children that they have waited for."""
    ticks, below = {}, defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = entry.read_text().rpartition(")")[2].split()
            pid = int(entry.parent.name)
            ticks[pid] = sum(map(int, words[11:15]))
            below[int(words[1])].append(pid)
    mine = [os.getpid()]
    for pid in mine:
        mine += below[pid]
    return sum(ticks[pid] for pid in mine) / os.sysconf("SC_CLK_TCK")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """The report takes the seconds along, from a worker of pytest-xdist too."""
    report = yield
    if call.when == "teardown":
        now = _cpu()
        report.cpu_seconds = max(0.0, now - item.config.stash[_BEFORE])
        item.config.stash[_BEFORE] = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    row = _ROWS[report.nodeid]
    row[0] += getattr(report, "cpu_seconds", 0.0)
    row[1] += report.duration
    row[2] += report.when == "call"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for name, its in _ROWS.items():
        row = rows[name if config.getoption("cost_of_tests") else name.partition("::")[0]]
        row[:] = [a + b for a, b in zip(row, its, strict=True)]
    terminalreporter.section("CPU seconds, seconds, tests")
    for name, (cpu, seconds, tests) in sorted(rows.items(), key=lambda row: row[1], reverse=True):
        terminalreporter.write_line(f"{cpu:8.2f} {seconds:8.2f} {int(tests):5d}  {name}")
