"""A daemon that starts over many lineages watches those that trained first, and reads no ended journal twice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opt_ops.config import Config, Mlflow
from opt_ops.core.events import DaemonStarted, StopRequested
from opt_ops.core.values import AllocationStatus
from opt_ops.runfolder import campaigns, journal_reader, lineages, snapshot
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.liveness import signs_in
from opt_ops.supervise import first_look
from opt_ops.supervise.daemon import Daemon
from tests.core.story import Story
from tests.supervise.test_campaigns import START
from tests.supervise.test_daemon_loop import NoNodes

ENDED = [str(number) for number in range(1, 9)]
LIVE = ["20", "21"]
HOUR = 3600.0

Starts = Callable[[], Daemon]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Eight ended lineages and two live ones, whose daemon died an hour ago."""
    for name in ENDED + LIVE:
        story = Story()
        story.begin()
        if name in ENDED:
            story.see(StopRequested(request="r", author="ann", reason=""))
            story.changed("12-n0", status=AllocationStatus.ENDED)
        story.save(tmp_path / name)
        os.utime(tmp_path / name / "journal.owner.json", (int(name), int(name)))
    return tmp_path


@pytest.fixture
def starts(runs: Path, monkeypatch: pytest.MonkeyPatch, draws_nothing: None) -> Iterator[Starts]:
    """Start a daemon that reads one journal of those it does not know in each round."""
    monkeypatch.setattr(first_look, "READ_SECONDS", 0.0)
    monkeypatch.setattr("opt_ops.supervise.daemon.scheduler_of", lambda *_: NoNodes())
    made: list[Daemon] = []

    def start() -> Daemon:
        made.append(Daemon(Config(runs=runs, mlflow=Mlflow(enabled=False))))
        made[-1]._first_look.learn(signs_in(runs))
        return made[-1]

    yield start
    for daemon in made:
        daemon._leave()


def died(runs: Path, *watched: str) -> float:
    at = time.time() - HOUR
    write_json(runs / "daemon.json", {"ts": at, "host": os.uname().nodename, "pid": 2**22 + 1, "lineages": watched})
    return at


def watched(daemon: Daemon) -> list[str]:
    return [path.name for path in daemon._supervisors]


@pytest.mark.parametrize("sign", [LIVE, []], ids=["named by the last daemon", "seen by the time of their owner"])
def test_live_lineages_are_watched_before_ended_ones_are_read(
    runs: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch, sign: list[str]
):
    before = died(runs, *sign)
    read: list[str] = []
    real = lineages.state
    monkeypatch.setattr(lineages, "state", lambda path, **more: (read.append(path.name), real(path, **more))[1])
    sizes = campaigns.create(runs, "sizes")
    lineages.ask(sizes, "ann", "start", START, time.time())
    daemon = starts()
    daemon._step()
    daemon._step()
    assert sorted(read) == LIVE
    assert sorted(watched(daemon)) == LIVE
    for name in LIVE:  # also of the one that was taken over after this daemon's own first sign
        blind = [e.event.blind_seconds for e in lineages.entries(runs / name) if isinstance(e.event, DaemonStarted)]
        assert blind[-1] is not None
        assert abs(blind[-1] - (time.time() - before)) < HOUR / 2
    for _ in ENDED:
        assert not daemon._idle()
        assert campaigns.state(sizes).started is None, "it would count nodes as free that an unread lineage holds"
        daemon._step()
    assert sorted(read, key=int) == ENDED + LIVE
    assert campaigns.state(sizes).started is not None
    daemon._step()
    assert len(read) == len(ENDED + LIVE)


def test_a_request_for_an_ended_lineage_comes_before_the_other_ended_ones(runs: Path, starts: Starts):
    died(runs, *LIVE)
    asked = lineages.ask(runs / "1", "ann", "note", {"text": "see 2", "target": "1"}, time.time())
    daemon = starts()
    for _ in range(3):
        daemon._step()
    assert daemon._first_look.left == len(ENDED) - 1
    assert not (runs / "1" / "inbox" / f"{asked.request}.json").exists()
    assert lineages.state(runs / "1").seq > 0


def test_after_an_upgrade_an_ended_journal_is_read_once_and_by_no_later_daemon(
    runs: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch
):
    died(runs, *LIVE)
    opened: list[str] = []
    real = journal_reader._FileReader.read

    def count(self: journal_reader._FileReader, until: int | None = None) -> None:
        if self._reading.start.seq == 0:
            opened.append(self._path.parent.parent.name)
        real(self, until)

    monkeypatch.setattr(journal_reader._FileReader, "read", count)
    monkeypatch.setattr(snapshot, "code_version", lambda: "of the new version")
    found: list[list[str]] = []
    for _ in range(2):
        opened.clear()
        daemon = starts()
        while daemon._first_look.left != 0:
            daemon._step()
        found.append([name for name in opened if name in ENDED])
    assert sorted(found[0], key=int) == ENDED
    assert found[1] == []
    with (runs / "1" / "journal" / "000001.jsonl").open("r+b") as file:  # the journal is the truth
        file.seek(-3, os.SEEK_END)
        file.write(b"x")
    opened.clear()
    daemon = starts()
    while daemon._first_look.left != 0:
        daemon._step()
    assert "1" in opened
