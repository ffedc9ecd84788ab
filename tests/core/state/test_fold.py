"""Fold: the same journal gives the same state, an event that cannot follow is refused, and no story gets stuck."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.codec import decode, encode
from opt_ops.core.decide.rules import decide
from opt_ops.core.state.fold import fold, replay
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import ancestry, newest_good
from opt_ops.core.state.status import TRANSITIONS, IllegalTransition, Status
from opt_ops.core.values import AllocationStatus, Outcome, Verdict
from tests.core.story import POLICY, Story

NODES = ("n1", "n2", "n3", "n4")

# What may happen next, each with a number that says where or to whom.
happenings = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "train",
                "checkpoint",
                "unhealthy",
                "rank_dies",
                "spike",
                "ends",
                "completes",
                "bad",
                "silent",
                "healthy",
                "lost",
                "waits",
                "daemon",
                "stop",
            ]
        ),
        st.integers(0, 999),
    ),
    max_size=40,
)


def tell(story: Story, what: str, number: int) -> None:
    """Let it happen if it can; check what must always hold after each of it."""
    attempt, allocation = story.state.attempt, story.state.allocation
    live = attempt is not None and attempt.live
    node = NODES[number % len(NODES)]
    if allocation is not None and allocation.live and allocation.job is None:
        left = [n for n in NODES if n not in allocation.exclude]
        if len(left) < allocation.wanted:
            story.see(e.AllocationFailed(allocation=allocation.name, why="too few nodes"))
        else:
            story.hold(*left[: allocation.wanted])
    elif allocation is not None and allocation.live and allocation.release_at:
        story.see(_changed(story, AllocationStatus.ENDED))
    elif what == "train" and live and not attempt.stop_why:
        story.train((attempt.last_step or (attempt.checkpoint.step if attempt.checkpoint else 0)) + 1 + number % 90)
    elif what in ("checkpoint", "unhealthy") and live and attempt.last_step:
        story.checkpoint(attempt.last_step, healthy=what == "checkpoint")
    elif what == "rank_dies" and live and not attempt.stop_why:
        story.rank_dies(attempt.last_step or 0)
    elif what == "spike" and live and attempt.last_step and not attempt.stop_why:
        story.spike(attempt.last_step, onset=max(1, attempt.last_step - 50))
    elif what in ("ends", "completes") and live:
        stopped = Outcome.STOPPED if attempt.stop_why else Outcome.FAILED
        story.ends(Outcome.COMPLETED if what == "completes" else stopped)
    elif what in ("bad", "silent", "healthy"):
        reasons = {"bad": (Verdict.BAD, "xid_79"), "silent": (Verdict.UNKNOWN, "silent")}
        story.judge(node, *reasons.get(what, (Verdict.HEALTHY, "ok")))
        for each in story.state.nodes.values():
            if each.drain == "intended":
                story.see(e.NodeDrained(node=each.name, done=bool(number % 2), why=""))
    elif what == "lost" and allocation is not None and allocation.live:
        story.see(_changed(story, AllocationStatus.ENDED))
        if live:
            story.ends(Outcome.LOST)
    elif what == "daemon":
        story.daemon(blind=3.0)
    elif what == "stop" and number % 7 == 0:
        story.see(e.StopRequested(request=f"stop{story.now}", author="ann", reason=""))
    else:
        story.see(seconds=float(number))


def _changed(story: Story, status: AllocationStatus) -> e.AllocationChanged:
    assert story.state.allocation is not None
    return e.AllocationChanged(allocation=story.state.allocation.name, status=status, nodes=(), reason="gone")


def check_always(before: State, event: e.Event, state: State) -> None:
    assert sum(attempt.live for attempt in state.attempts.values()) <= 1
    if state.lineage is not None:
        pending = sum(allocation.wanted for allocation in state.live_allocations if allocation.pending)
        assert pending <= state.shape.nodes + state.shape.spares, "more is asked for than is needed"
    if not isinstance(event, e.AttemptIntended):
        return
    assert not before.ended, "an ended lineage starts nothing"
    assert not (before.attempt and before.attempt.live), "two attempts at once"
    for name in event.nodes:
        node = before.nodes[name]
        assert node.excluded_by is None
        assert node.verdict is Verdict.HEALTHY
    if event.checkpoint is not None:
        chosen = before.checkpoints[event.checkpoint.path]
        assert chosen.good
        limit = dict(ancestry(before, event.run))[event.checkpoint.run]
        assert limit is None or event.checkpoint.step <= limit, "a checkpoint of a stretch that was rolled back"
        assert chosen == newest_good(before, event.run)


@settings(max_examples=300, deadline=None)
@given(happenings)
def test_whatever_happens_the_promises_hold_and_a_replay_agrees(what: list[tuple[str, int]]):
    story = Story()
    story.begin()
    for name, number in what:
        tell(story, name, number)
    state = State()
    for entry in story.entries:
        event = decode(json.loads(json.dumps(encode(entry.event))))
        before, state = state, fold(state, e.Entry(seq=entry.seq, epoch=entry.epoch, ts=entry.ts, event=event))
        check_always(before, event, state)
    assert state == story.state == replay(story.entries)


@settings(max_examples=100, deadline=None)
@given(happenings)
def test_a_daemon_killed_between_any_two_entries_decides_the_same(what: list[tuple[str, int]]):
    """A decision does not depend on how many entries a daemon process managed to write."""
    story = Story()
    story.begin()
    for name, number in what:
        tell(story, name, number)
    state = State()
    for position, entry in enumerate(story.entries):
        state = fold(state, entry)
        following = story.entries[position + 1] if position + 1 < len(story.entries) else None
        decided = decide(state, entry.ts, POLICY)
        if decided is not None and following is not None and following.ts == entry.ts:
            assert decided == following.event


@settings(max_examples=200, deadline=None)
@given(happenings)
def test_no_story_gets_stuck(what: list[tuple[str, int]]):
    """From any state, a world that works again leads to training or to an end with a reason."""
    story = Story()
    story.begin()
    for name, number in what:
        tell(story, name, number)
    for _ in range(60):
        if story.state.ended or story.state.status is Status.TRAINING:
            break
        attempt = story.state.attempt
        if attempt is not None and attempt.live:
            tell(story, "ends" if attempt.stop_why else "train", 5)
        else:
            tell(story, "waits", 200)
    else:
        pytest.fail(f"stuck in {story.state.status}")
    assert story.state.status is Status.TRAINING or story.state.why or story.state.status is Status.COMPLETED


def test_every_status_is_reachable_and_only_ends_are_final():
    reachable = {Status.NEW} | {after for _, after in TRANSITIONS}
    assert reachable == set(Status)
    assert set(Status) - {before for before, _ in TRANSITIONS} == {Status.COMPLETED, Status.CANCELLED}


def test_an_event_that_cannot_follow_is_refused():
    story = Story()
    story.begin()
    state = story.state
    for event in (
        e.LineageStarted(request="r", author="a", lineage="12", recipe="x", settings=(), shape=story.shape),
        e.AttemptStarted(attempt="12.09-a9", at=0.0),
        e.AllocationSubmitted(allocation="nowhere", job="1", adopted=False),
    ):
        with pytest.raises(IllegalTransition):
            fold(state, e.Entry(seq=9, epoch=1, ts=0.0, event=event))
