"""The watch over jobs: the end of a job is a signal only for the attempt that runs in it."""

from __future__ import annotations

from types import SimpleNamespace

from opt_ops.core import events as e
from opt_ops.core.values import AllocationStatus
from opt_ops.errors import NotYet
from opt_ops.ports import JobState
from opt_ops.supervise.watch_allocation import AllocationWatch
from tests.core.story import Story


def observed(story: Story) -> list[e.Event]:
    """Return the events when the job of every allocation has been cancelled."""
    cancelled = JobState(AllocationStatus.ENDED, (), "CANCELLED")
    scheduler = SimpleNamespace(state=lambda job: cancelled, jobs=list)
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

    def state(_: str) -> JobState:
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
