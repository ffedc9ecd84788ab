"""The watch over jobs: the end of a job is a signal only for the attempt that runs in it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from opt_ops.core import events as e
from opt_ops.core.decide.capacity import eligible_nodes
from opt_ops.core.decide.retry_budget import spends_budget
from opt_ops.core.state.queries import suspended
from opt_ops.core.values import AllocationStatus, Severity
from opt_ops.errors import NotYet, SchedulerUnavailable
from opt_ops.ports import JobState
from opt_ops.supervise.watch_allocation import SUSPENDED_SECONDS, AllocationWatch
from tests.core.story import POLICY, Story


def observed(story: Story) -> list[e.Event]:
    """Return the events when the job of every allocation has been cancelled."""
    cancelled = JobState(AllocationStatus.ENDED, (), "CANCELLED")
    scheduler = SimpleNamespace(state=lambda *_: cancelled, jobs=list)
    training = SimpleNamespace(last=lambda attempt: None, report_progress=lambda attempt: ())
    clock = SimpleNamespace(monotonic=lambda: 0.0, now=lambda: story.now)
    return list(AllocationWatch(scheduler, training, clock).observe(story.state))


def test_the_end_of_the_job_under_the_attempt_is_a_signal():
    raised, changed = observed(Story().training(450))
    assert isinstance(raised, e.SignalRaised)
    assert raised.signal == "job_cancelled"
    assert isinstance(changed, e.AllocationChanged)


def test_the_end_of_a_job_that_was_given_back_is_none_though_another_now_holds_its_nodes():
    story = Story().training(450)
    first = story.state.allocation
    story.write(e.ReleaseIntended(allocation=first.name, why="none of its nodes is fit"))
    story.write(e.AllocationIntended(allocation="12-n9", nodes=3, exclude=(), why="0 of 3 nodes are held"))
    story.write(e.AllocationSubmitted(allocation="12-n9", job="78", adopted=False))
    story.write(e.AllocationChanged(allocation="12-n9", status=AllocationStatus.RUNNING, nodes=first.nodes, reason=""))
    assert [type(event) for event in observed(story)] == [e.AllocationChanged, e.SignalRaised, e.AllocationChanged]


def test_a_drained_node_stays_drained_while_the_scheduler_does_not_answer():
    story = Story().training(450)
    drained = {"n2": "slurm_drained: fan"}
    answers: list[JobState | NotYet] = [
        JobState(AllocationStatus.RUNNING, ("n1", "n2", "n3"), "", drained),
        NotYet("Slurm did not answer in 2 s"),
        JobState(AllocationStatus.RUNNING, ("n1", "n2", "n3"), ""),
    ]

    def state(*_: object) -> JobState:
        answer = answers.pop(0)
        if isinstance(answer, NotYet):
            raise answer
        return answer

    clock = SimpleNamespace(monotonic=lambda: 0.0, now=lambda: story.now)
    watch = AllocationWatch(SimpleNamespace(state=state, jobs=list), SimpleNamespace(), clock)
    found = []
    for _ in range(3):
        list(watch.observe(story.state))
        found.append(watch.unfit)
    assert found == [drained, drained, {}]


class Scheduler:
    """The watch of a lineage whose attempt trains, and a scheduler that says the same until it says something else."""

    def __init__(self, story: Story | None = None) -> None:
        self.story = story or Story(replace(POLICY, least_alert=Severity.WARNING)).training(450)
        self.answer: JobState | SchedulerUnavailable = self.runs()
        self.seconds = 0.0
        training = SimpleNamespace(last=lambda _: None, report_progress=lambda _: ())
        clock = SimpleNamespace(monotonic=lambda: self.seconds, now=lambda: self.story.now)
        scheduler = SimpleNamespace(state=self._state, jobs=list)
        self.watch = AllocationWatch(scheduler, training, clock)

    def runs(self) -> JobState:
        return JobState(AllocationStatus.RUNNING, ("n1", "n2", "n3"), "")

    def _state(self, *_: object) -> JobState:
        if isinstance(self.answer, SchedulerUnavailable):
            raise self.answer
        return self.answer

    def says(self, answer: JobState | SchedulerUnavailable, seconds: float = 5.0) -> list[e.Event]:
        """The events of a look after so many seconds, with what is decided about them."""
        self.answer = answer
        self.seconds += seconds
        self.story.now += seconds
        seen: list[e.Event] = []
        for event in self.watch.observe(self.story.state):
            self.story.write(event)
            seen.append(event)
        return seen + self.story.decide()


def test_a_suspended_job_is_held_and_told_after_minutes_and_its_attempt_goes_on():
    slurm = Scheduler()
    stopped = JobState(AllocationStatus.SUSPENDED, ("n1", "n2", "n3"), "SUSPENDED")
    assert [type(event) for event in slurm.says(stopped)] == [e.AllocationChanged]
    state, attempt = slurm.story.state, slurm.story.state.attempt
    assert suspended(state, attempt) is state.allocation
    assert set(state.held) == {"n1", "n2", "n3"}
    assert eligible_nodes(state, slurm.story.policy, slurm.story.now) == [], "nothing new starts there"
    assert slurm.says(stopped, seconds=SUSPENDED_SECONDS - 60.0) == []

    raised, opened, decided, *_ = slurm.says(stopped, seconds=60.0)
    assert isinstance(raised, e.SignalRaised)
    assert isinstance(opened, e.IncidentOpened)
    assert opened.failure == "suspended"
    assert "suspended for 10 min" in opened.cause
    assert isinstance(decided, e.RecoveryDecided)
    assert decided.action == "tell"
    assert slurm.says(stopped, seconds=3600.0) == [], "once"

    assert [type(event) for event in slurm.says(slurm.runs())] == [e.AllocationChanged]
    state = slurm.story.state
    assert state.attempt.live
    assert state.attempt.name == attempt.name
    assert suspended(state, state.attempt) is None
    assert not any(spends_budget(incident) for incident in state.incidents.values())
    slurm.story.rank_dies(460)
    assert [i.kind for i in slurm.story.state.incidents.values()] == ["suspended", "process_death"]


def test_short_suspensions_are_no_incident_however_often():
    slurm = Scheduler()
    for _ in range(20):
        slurm.says(JobState(AllocationStatus.SUSPENDED, ("n1", "n2", "n3"), "SUSPENDED"), seconds=30.0)
        slurm.says(slurm.runs(), seconds=30.0)
    assert slurm.story.state.incidents == {}
    assert slurm.story.state.attempt.live


def test_nodes_that_are_configured_again_are_not_lost():
    slurm = Scheduler()
    assert slurm.says(JobState(AllocationStatus.QUEUED, ("n1", "n2", "n3"), "CONFIGURING")) == []
    raised, *_ = slurm.says(JobState(AllocationStatus.QUEUED, (), "BeginTime"))
    assert isinstance(raised, e.SignalRaised)
    assert raised.signal == "allocation_lost"


def test_a_reason_that_changes_at_each_look_is_journaled_rarely():
    story = Story()
    story.begin()
    story.see(e.AllocationSubmitted(allocation=story.state.allocation.name, job="77", adopted=False))
    slurm = Scheduler(story)
    told = 0
    for look in range(720):
        reason = ("Priority", "Resources", f"ReqNodeNotAvail, UnavailableNodes:n{look}")[look % 3]
        told += sum(
            isinstance(event, e.AllocationChanged)
            for event in slurm.says(JobState(AllocationStatus.QUEUED, (), reason))
        )
    assert 5 <= told <= 7, "in an hour"
    assert len(slurm.says(slurm.runs())) >= 1, "but a state that changes is"


def test_a_state_that_is_not_known_is_told_after_minutes_and_once():
    slurm = Scheduler()
    unknown = SchedulerUnavailable("Slurm reports '77|LEVITATING|' for job 77, which is no state that opt-ops knows")
    (changed,) = slurm.says(unknown)
    assert changed.status is AllocationStatus.UNKNOWN
    assert slurm.says(SchedulerUnavailable("and in other words"), seconds=300.0) == [], "unknown is unknown"
    (alert,) = slurm.says(unknown, seconds=300.0)
    assert isinstance(alert, e.AlertIntended)
    assert "job 77 is not known" in alert.title
    assert "LEVITATING" in alert.body
    for _ in range(10):
        assert not any(isinstance(event, e.AlertIntended) for event in slurm.says(unknown, seconds=300.0))
    slurm.says(slurm.runs())
    assert slurm.story.state.allocation.unknown_since is None
    assert slurm.story.state.attempt.live
