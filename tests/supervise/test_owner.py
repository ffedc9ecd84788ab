"""One owner: whatever a daemon sees of the folder, and however late, two of them never act on one lineage."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.laboratory.simulated import World, faults
from opt_ops.laboratory.simulated.drive import Pace, pass_time
from opt_ops.laboratory.simulated.ports import ports
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.runfolder.journal import Fenced, Journal, read
from opt_ops.runfolder.owner import DEAD_SECONDS, OwnerFile, OwnerWatch
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor
from tests.laboratory.simulated_lineage import POLICY, SITE, physics, start, without_sync


class Views:
    """What each daemon sees when it lists a folder: as it was up to `lag` seconds ago, as on a network file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]) -> None:
        self._clock, self._scandir = clock, os.scandir
        self._seen: dict[tuple[str, str], tuple[float, list[Any]]] = {}
        self.daemon, self.lag = "", 0.0
        monkeypatch.setattr("os.scandir", self.scandir)

    def scandir(self, path: Any = ".") -> Any:
        if not self.daemon:
            return self._scandir(path)
        key = (self.daemon, str(path))
        at, listing = self._seen.get(key, (-1e9, []))
        if self._clock() - at > self.lag:
            listing = list(self._scandir(path))
            self._seen[key] = self._clock(), listing
        return Listing(listing)


class Listing(list[Any]):
    def __enter__(self) -> Iterator[Any]:
        return iter(self)

    def __exit__(self, *_: object) -> None:
        pass


class TwoDaemons:
    """Two daemons on two hosts, with one world and one folder."""

    def __init__(self, folder: Path, lag: float, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.folder = folder
        plan = [
            Planned(fault=start(), at=0.0),
            Planned(fault=faults.KillRank(rank=1), step=60),
            Planned(fault=faults.BadGpu(), step=120),
        ]
        self.world = World(physics(400, save_every=30, step_seconds=6.0), None, plan)
        self.views = Views(monkeypatch, lambda: self.world.now)
        self.views.lag = lag
        self.daemons: dict[str, Supervisor] = {}
        self.fenced: dict[str, str] = {}
        self.submissions: list[str] = []
        self.cancelled_in_training: list[str] = []
        submit, cancel = self.world.cluster.submit, self.world.cluster.cancel
        self.world.cluster.submit = lambda name, *rest: (self.submissions.append(name), submit(name, *rest))[1]
        self.world.cluster.cancel = lambda job: (self._note_cancel(job), cancel(job))[1]

    def _note_cancel(self, job: str) -> None:
        running = self.world.running
        if running and set(running.launch.nodes) & set(self.world.cluster.jobs[job].nodes):
            self.cancelled_in_training.append(job)

    def begin(self, host: str) -> None:
        self.views.daemon = host
        with self.as_daemon(host):
            identity = DaemonIdentity(host=host, pid=1, last_liveness=None)
            self.daemons[host] = Supervisor(self.folder, ports(self.world), POLICY, SITE, identity)

    def as_daemon(self, host: str) -> "TwoDaemons":
        self.views.daemon = host
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.views.daemon = ""

    def run(self, until: float, stop: Callable[[], bool] = lambda: False) -> None:
        while self.world.now < until and not stop():
            for host, daemon in list(self.daemons.items()):
                try:
                    with self.as_daemon(host):
                        daemon.tick()
                except Fenced as error:
                    self.fenced[host] = str(error)
                    del self.daemons[host]
            pass_time(self.world, until, Pace(tick=5.0, settle=30.0))

    def status(self) -> Status | None:
        return next((daemon.state.status for daemon in self.daemons.values()), None)


@pytest.mark.parametrize("lag", [0.0, 5.0, 30.0, 60.0, 90.0])
@pytest.mark.parametrize("after", [0.0, 7.0, 200.0])
def test_two_daemons_with_late_views_submit_nothing_twice_and_cancel_nothing_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: float, after: float
):
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", lag, monkeypatch)
    two.begin("a")
    two.run(until=5.0 + after)
    two.begin("b")
    two.run(until=20_000.0, stop=lambda: two.status() is Status.COMPLETED)
    assert list(two.fenced) == ["a"]
    assert "epoch 2 has taken over" in two.fenced["a"]
    assert two.daemons["b"].state.status is Status.COMPLETED
    assert len(two.submissions) == len(set(two.submissions)), "an allocation was submitted twice"
    # A job is cancelled only when its training is over, or is moved off a bad node.
    drained = [node.name for node in two.daemons["b"].state.nodes.values() if node.excluded_by]
    assert drained
    assert not two.cancelled_in_training
    starts = two.world.agents.starts
    assert set(starts.values()) == {1}, "no rank was started twice"
    entries, notes = read(two.folder / "journal")
    assert entries[-1].seq == two.daemons["b"].state.seq
    assert not any("void" in note for note in notes)


def test_the_newer_daemon_writes_the_orders_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", 0.0, monkeypatch)
    two.begin("a")
    two.run(until=300.0)
    two.begin("b")
    two.run(until=310.0)
    assert two.world.agents.orders is not None
    assert two.world.agents.orders.epoch == 2


def test_a_fenced_daemon_does_nothing_although_it_has_something_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The owner changes between the look and each effect."""
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", 0.0, monkeypatch)
    two.begin("a")
    check, taken = two.daemons["a"]._journal.check_fence, []

    def taken_over_now() -> None:
        if not taken and two.daemons["a"].state.live_allocations:
            taken.append(Journal(two.folder / "journal"))
        check()

    two.daemons["a"]._executor._check_owner = taken_over_now
    two.run(until=300.0)
    assert "epoch 2" in two.fenced["a"]
    assert two.submissions == []


def test_foreign_orders_of_a_higher_epoch_are_outranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", 0.0, monkeypatch)
    two.begin("a")
    two.run(until=2_000.0, stop=lambda: two.status() is Status.TRAINING)
    orders = two.world.agents.orders
    assert orders is not None
    two.world.agents.order(replace(orders, epoch=4711, seq=1))  # restored from a backup, or forged
    two.run(until=20_000.0, stop=lambda: two.status() is Status.COMPLETED)
    state = two.daemons["a"].state
    assert state.status is Status.COMPLETED
    assert state.epoch == 4712
    assert (two.folder / "journal" / "004712.jsonl").stat().st_size > 0
    kinds = [entry.event for entry in read(two.folder / "journal")[0] if isinstance(entry.event, e.DaemonStarted)]
    assert len(kinds) == 2
    assert set(two.world.agents.starts.values()) == {1}


def test_orders_that_agents_refuse_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", 0.0, monkeypatch)
    two.begin("a")
    two.run(until=2_000.0, stop=lambda: two.status() is Status.TRAINING)
    orders, written = two.world.agents.orders, []
    monkeypatch.setattr(two.world.agents, "order", written.append)
    two.daemons["a"]._nodes.orders_refused = lambda node: "it belongs to user 12345"
    began = two.world.now
    two.run(until=began + 35.0)
    assert orders is not None
    assert all(each.launch == orders.launch for each in written)
    assert 3 <= len(written) <= 4, "not at each look"


def test_a_folder_that_is_gone_stays_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    two = TwoDaemons(tmp_path / "1", 0.0, monkeypatch)
    two.begin("a")
    two.run(until=500.0)
    shutil.move(tmp_path / "1", tmp_path / "renamed")
    two.run(until=600.0)
    assert "is gone" in two.fenced["a"]
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"v": 1}', '{"epoch": "2"}', "null", "\x00"])
def test_a_damaged_owner_file_gives_nobody_leave_to_act(tmp_path: Path, content: str):
    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal.owner.json").write_text(content)
    with pytest.raises(Fenced, match="damaged"):
        journal.check_fence()
    later = Journal(tmp_path / "journal")
    later.check_fence()


def test_an_old_owner_file_gives_nobody_leave_to_act(tmp_path: Path):
    first = Journal(tmp_path / "journal")
    old = (tmp_path / "journal.owner.json").read_bytes()
    first.append(first.stamp(e.DrillDone(drill="d"), 0.0))
    second = Journal(tmp_path / "journal")
    second.append(second.stamp(e.DrillDone(drill="d"), 0.0))
    (tmp_path / "journal.owner.json").write_bytes(old)
    with pytest.raises(Fenced, match="epoch 1 has taken over"):
        second.check_fence()
    assert Journal(tmp_path / "journal").epoch == 3


def test_a_takeover_knows_the_file_of_its_owner_even_if_no_listing_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    views = Views(monkeypatch, lambda: 0.0)
    views.lag = 60.0
    views.daemon = "b"
    (tmp_path / "journal").mkdir()
    assert list(views.scandir(tmp_path / "journal")) == []
    views.daemon = "a"
    first = Journal(tmp_path / "journal")
    first.append(first.stamp(e.DrillDone(drill="d"), 0.0))
    views.daemon = "b"
    second = Journal(tmp_path / "journal")
    assert second.epoch == 2
    assert [entry.epoch for entry in second.entries] == [1]


def test_an_owner_without_a_sign_of_life_may_be_replaced(tmp_path: Path):
    owner = Journal(tmp_path / "journal")
    watch = OwnerWatch(tmp_path / "journal", 100.0)
    assert not watch.dead(100.0 + DEAD_SECONDS - 1)
    os.utime(tmp_path / "journal.owner.json", ns=(1, 1))
    assert watch.changed()
    assert not watch.dead(100.0 + DEAD_SECONDS), "it has shown life"
    assert not watch.dead(100.0 + 2 * DEAD_SECONDS - 1)
    assert watch.dead(100.0 + 2 * DEAD_SECONDS)
    owner.show_life(1e9)
    assert not watch.dead(100.0 + 3 * DEAD_SECONDS)
    OwnerFile(tmp_path / "journal").path.unlink()
    assert watch.dead(100.0 + 3 * DEAD_SECONDS)
