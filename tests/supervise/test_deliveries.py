"""Pages arrive: whenever and for however long the notifier fails, none is lost, and none comes again too soon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.events import AlertIntended, AlertSettled, Entry, Event
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.values import Severity
from opt_ops.ports import Alert, Ports
from opt_ops.supervise.executor import IntentExecutor, Site
from opt_ops.supervise.watch_alerts import WatchAlerts
from tests.core.story import Story

TICK = 10.0
TEN_MINUTES = 600.0


@dataclass
class Clock:
    seconds: float = 0.0

    def now(self) -> float:
        return 1_000_000.0 + self.seconds

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class Pager:
    """A notifier that fails in some intervals. It delivers at once."""

    clock: Clock
    away: Sequence[tuple[float, float]]
    arrived: list[tuple[float, str]] = field(default_factory=list)
    tried: list[tuple[float, str]] = field(default_factory=list)
    outcomes: list[tuple[str, str]] = field(default_factory=list)

    def send(self, alert: Alert) -> None:
        now = self.clock.seconds
        self.tried.append((now, alert.id))
        if any(begin <= now < begin + length for begin, length in self.away):
            self.outcomes.append((alert.id, "HTTP 503"))
        else:
            self.arrived.append((now, alert.id))
            self.outcomes.append((alert.id, ""))

    def delivered(self) -> Sequence[tuple[str, str]]:
        outcomes, self.outcomes = self.outcomes, []
        return outcomes


class _Nothing:
    """A port that does nothing, of a lineage in which only alerts happen."""

    def order(self, orders: object) -> None:
        pass


@dataclass
class Lineage:
    """A journal in memory, whose alerts the real executor delivers."""

    clock: Clock
    pager: Pager
    state: State = field(default_factory=lambda: _quiet().state)

    def __post_init__(self) -> None:
        ports = Ports(
            clock=self.clock,
            scheduler=_Nothing(),  # type: ignore[arg-type]
            agents=_Nothing(),  # type: ignore[arg-type]
            trainer=_Nothing(),  # type: ignore[arg-type]
            checkpoints=_Nothing(),  # type: ignore[arg-type]
            inbox=_Nothing(),  # type: ignore[arg-type]
            notifier=self.pager,
            evaluations=_Nothing(),  # type: ignore[arg-type]
        )
        self.executor = IntentExecutor(ports, Site(folder="/runs/12", trainer=("train",)))

    def write(self, event: Event) -> None:
        entry = Entry(seq=self.state.seq + 1, epoch=self.state.epoch, ts=self.clock.now(), event=event)
        self.state = fold(self.state, entry)

    def intend(self, name: str, severity: Severity) -> None:
        self.write(AlertIntended(alert=name, severity=severity, title=name, body=""))

    def tick(self) -> None:
        for event in list(self.executor._deliver_alerts(self.state)):
            assert isinstance(event, AlertSettled)
            self.write(event)


def _quiet() -> Story:
    story = Story()
    story.begin()
    return story


INTERVALS = st.lists(st.tuples(st.floats(0, 20_000), st.floats(1, 40_000)), max_size=4)
ALERTS = st.lists(st.tuples(st.floats(0, 20_000), st.sampled_from(list(Severity))), min_size=1, max_size=6)


@given(away=INTERVALS, alerts=ALERTS)
def test_no_page_is_lost_and_none_comes_more_often_than_every_ten_minutes(
    away: Sequence[tuple[float, float]], alerts: Sequence[tuple[float, Severity]]
):
    clock = Clock()
    pager = Pager(clock, away)
    lineage = Lineage(clock, pager)
    coming = sorted((at, f"12/{number}", severity) for number, (at, severity) in enumerate(alerts))
    end = max([begin + length for begin, length in away] + [at for at, _, _ in coming]) + 2 * TEN_MINUTES
    pages = [name for _, name, severity in coming if severity is Severity.PAGE]
    while clock.seconds < end:
        while coming and coming[0][0] <= clock.seconds:
            _, name, severity = coming.pop(0)
            lineage.intend(name, severity)
        lineage.tick()
        clock.seconds += TICK
    arrived = [name for _, name in pager.arrived]
    assert sorted(name for name in arrived if name in pages) == sorted(pages), "each once"
    assert all(lineage.state.alerts[name].delivered for name in pages)


def test_a_page_that_waits_is_sent_as_soon_as_any_other_message_gets_through():
    clock = Clock()
    pager = Pager(clock, [(0.0, 5_000.0)])
    lineage = Lineage(clock, pager)
    lineage.intend("12/halted", Severity.PAGE)
    while clock.seconds < 5_000.0:
        lineage.tick()
        clock.seconds += TICK
    tries = [at for at, _ in pager.tried]
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[:4] == [60.0, 120.0, 240.0, 480.0]
    assert set(pauses[4:]) == {TEN_MINUTES}
    lineage.intend("12/closed", Severity.INFO)
    for _ in range(3):
        lineage.tick()
        clock.seconds += TICK
    assert [name for _, name in pager.arrived] == ["12/closed", "12/halted"]


def test_other_alerts_are_given_up_after_an_hour():
    clock = Clock()
    lineage = Lineage(clock, Pager(clock, [(0.0, 1e9)]))
    lineage.intend("12/info", Severity.WARNING)
    lineage.intend("12/page", Severity.PAGE)
    while clock.seconds < 4_000.0:
        lineage.tick()
        clock.seconds += TICK
    assert lineage.state.alerts["12/info"].delivered is False
    assert lineage.state.alerts["12/page"].delivered is None


@given(away=INTERVALS, watched_at=st.floats(1, 60_000), answered_at=st.none() | st.floats(1, 60_000))
def test_an_unwatched_lineage_is_paged_every_hour_until_it_is_watched_or_answered(
    away: Sequence[tuple[float, float]], watched_at: float, answered_at: float | None
):
    clock = Clock()
    pager = Pager(clock, away)

    def answered(lineage: str, since: float) -> bool:
        return answered_at is not None and answered_at <= clock.seconds and 1_000_000.0 + answered_at > since

    alerts = WatchAlerts(pager, clock, answered)
    alerts.unwatched("12", "its journal is damaged")
    while clock.seconds < watched_at:
        alerts.step()
        clock.seconds += TICK
    alerts.watched("12")
    times = [at for at, _ in pager.arrived]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(gap >= 3600.0 for gap in gaps)
    if answered_at is not None and times and times[0] < answered_at:
        assert len([at for at in times if at > answered_at]) <= 1, "at most the page that was on its way"
    elif not away:
        assert len(times) >= watched_at // 3700.0


def test_a_new_daemon_does_not_page_again_within_the_hour():
    clock = Clock()
    pager = Pager(clock, [])
    alerts = WatchAlerts(pager, clock, lambda *_: False, paged={"12": clock.now() - 600.0})
    alerts.unwatched("12", "its journal is damaged")
    for _ in range(400):
        alerts.step()
        clock.seconds += TICK
    assert [at for at, _ in pager.arrived] == [3000.0]


def test_a_fenced_daemon_warns_once_and_pages_if_nobody_watches():
    clock = Clock()
    pager = Pager(clock, [])
    alerts = WatchAlerts(pager, clock, lambda *_: False)
    alerts.fenced("12", "epoch 3 has taken over")
    for _ in range(20):
        alerts.step()
        clock.seconds += TICK
    assert [name.split("/")[1] for _, name in pager.arrived] == ["fenced", "unwatched"]
    assert pager.arrived[1][0] == 90.0
    quiet = WatchAlerts(pager, clock, lambda *_: False)
    pager.arrived.clear()
    quiet.fenced("13", "epoch 3 has taken over")
    quiet.watched("13")
    for _ in range(20):
        quiet.step()
        clock.seconds += TICK
    assert [name.split("/")[1] for _, name in pager.arrived] == ["fenced"]
