"""Each part of the watch is guarded by itself: one that fails is reported, and the others go on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opt_ops.core.events import AllocationChanged, Event, InputLeftOut, WatcherFailed, WatcherRecovered
from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.model import State
from opt_ops.core.values import AllocationStatus, Status
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.world import Planned
from opt_ops.ports import LeftOut
from opt_ops.runfolder.journal import Fenced
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.supervisor import Supervisor
from opt_ops.supervise.watch_inputs import InputWatch
from tests.core.story import Story
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, start


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


def boom(*_: Any) -> Any:
    raise KeyError("x\ud800")


def tell(guard: Guard, story: Story) -> list[Event]:
    events = list(guard.news(story.state))
    for event in events:
        story.write(event)
    return events


def test_a_failure_is_told_once_until_it_changes_and_then_its_end():
    clock, story = Clock(), Story()
    guard = Guard(clock)
    for _ in range(50):
        assert guard.call("readings", boom, 7) == 7
        clock.time += 1
    (failed,) = tell(guard, story)
    assert isinstance(failed, WatcherFailed)
    assert failed.watcher == "readings"
    assert failed.why.startswith("KeyError: 'x\\ud800' (test_guard.py:")
    for _ in range(100):
        guard.call("readings", boom, 7)
        assert not tell(guard, story)
        clock.time += 1
    assert set(story.state.failing) == {"readings"}
    clock.time += 60
    assert tell(guard, story) == [WatcherRecovered(watcher="readings")]
    assert not story.state.failing


def test_a_part_that_fails_now_and_then_does_not_flood_the_journal():
    clock, story, told = Clock(), Story(), 0
    guard = Guard(clock)
    for _ in range(24 * 30):  # a day, every two minutes
        guard.call("readings", boom, None)
        told += len(tell(guard, story))
        clock.time += 65
        told += len(tell(guard, story))
        clock.time += 55
    assert told < 100


def test_a_new_daemon_process_knows_after_a_while_that_a_part_works_again():
    clock, story = Clock(), Story()
    story.write(WatcherFailed(watcher="readings", why="KeyError"))
    guard = Guard(clock)
    assert not tell(guard, story)
    clock.time += 60
    assert tell(guard, story) == [WatcherRecovered(watcher="readings")]


def test_what_ends_a_supervisor_is_not_caught():
    guard = Guard(Clock(), (Fenced,))
    with pytest.raises(Fenced):
        guard.call("x", lambda: (_ for _ in ()).throw(Fenced("a", "b")), None)
    for each in guard.each("x", lambda: [0]):
        with pytest.raises(ZeroDivisionError):
            assert 1 / each, "an error of the consumer is not one of the part"
    assert not list(guard.news(State()))


def lineage(tmp_path: Path, *plan: Planned) -> SimulatedLineage:
    return SimulatedLineage(tmp_path, [Planned(fault=start(), at=0.0), *plan], physics(400))


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        ("AllocationWatch", "_orphan_jobs"),
        ("NodeWatch", "_take_heartbeat"),
        ("NodeWatch", "_compare"),
        ("TrainingWatch", "_enter"),
        ("CheckpointWatch", "observe"),
        ("TrainingWatch", "_pin"),
        ("InputWatch", "observe"),
        ("LossDetector", "observe"),
        ("ThroughputDetector", "observe"),
        ("IntentExecutor", "_deliver_alerts"),
        ("IntentExecutor", "_inject_drills"),
    ],
)
def test_a_rank_that_dies_is_recovered_whatever_part_of_the_watch_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str, method: str
):
    import opt_ops.supervise.executor as executor
    import opt_ops.supervise.supervisor as supervisor
    import opt_ops.supervise.watch_training as training
    from opt_ops.core.detect import all as detectors

    simulated = lineage(tmp_path, Planned(fault=faults.KillRank(), step=300))
    simulated.begin()
    drive(simulated, lambda state: state.attempt is not None and (state.attempt.last_step or 0) >= 200, "training")
    place = next(m for m in (supervisor, executor, training, detectors) if hasattr(m, owner))
    monkeypatch.setattr(getattr(place, owner), method, boom)
    done = drive(
        simulated,
        lambda state: any(i.kind == FailureClass.PROCESS_DEATH and i.next_attempt for i in state.incidents.values()),
        "a recovery",
    )
    assert done.failing
    assert simulated.supervisor is not None
    monkeypatch.undo()
    simulated.begin()


def drive(simulated: SimulatedLineage, until: Any, what: str) -> State:
    from opt_ops.laboratory.simulated.drive import Pace, pass_time

    assert simulated.supervisor is not None
    for _ in range(20_000):
        simulated.supervisor.tick()
        if until(simulated.supervisor.state):
            return simulated.supervisor.state
        pass_time(simulated.world, 10 * 86400.0, Pace(stride=60.0))
    raise AssertionError(f"no {what}: {simulated.supervisor.state.status}")


def test_an_event_that_cannot_follow_is_dropped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    simulated = lineage(tmp_path)
    supervisor = simulated.begin()
    drive(simulated, lambda state: state.status is Status.TRAINING, "training")
    wrong = AllocationChanged(allocation="none", status=AllocationStatus.RUNNING, nodes=(), reason="")
    monkeypatch.setattr(
        supervisor, "_watchers", supervisor._watchers | {"wrong": SimpleNamespace(observe=lambda _: iter([wrong]))}
    )
    supervisor.tick()
    assert "allocation_changed was refused" in supervisor.state.failing["wrong"].why
    assert any("a part of the watch fails: wrong" in each.told.title for each in tick(supervisor).alerts.values())
    again = simulated.begin()
    assert "wrong" in again.state.failing, "the journal is readable"


def tick(supervisor: Supervisor) -> State:
    supervisor.tick()
    return supervisor.state


def test_decisions_that_fail_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    simulated = lineage(tmp_path)
    supervisor = simulated.begin()
    drive(simulated, lambda state: state.status is Status.TRAINING, "training")
    monkeypatch.setattr("opt_ops.supervise.supervisor.decide", boom)
    for _ in range(3):
        supervisor.tick()
    assert any("fails: decisions" in each.told.title for each in supervisor.state.alerts.values())


def left(count: int, taken: int = 100) -> LeftOut:
    return LeftOut(source="heartbeats", file="health/n1.jsonl", count=count, taken=taken, first="a", newest=str(count))


def test_what_is_left_out_is_told_as_it_grows_and_never_in_a_flood():
    clock, story, found = Clock(), Story(), [left(3)]
    watch = InputWatch(SimpleNamespace(left_out=lambda: found), clock)

    def look() -> list[InputLeftOut]:
        events = list(watch.observe(story.state))
        for event in events:
            story.write(event)
        return [event for event in events if isinstance(event, InputLeftOut)]

    (first,) = look()
    assert (first.count, first.taken, first.most) == (3, 100, False)
    told = 0
    for second in range(86_400):
        found[:] = [left(4 + second, 10**9)]
        clock.time += 1
        told += len(look())
    assert 20 < told < 50
    found[:] = [left(2 * 10**5, 10**4)]
    (most,) = look()
    assert most.most, "that most is left out is reported at once"
    again = InputWatch(SimpleNamespace(left_out=lambda: [left(2)]), clock)
    (event,) = again.observe(story.state)
    assert event.count == 2 * 10**5 + 2, "heartbeats that an earlier process left out are counted too"
