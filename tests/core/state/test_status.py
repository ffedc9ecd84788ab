"""The two status tables: each edge is taken by a story, no story takes another one, and each event kind is a choice."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from opt_ops.core import events as e
from opt_ops.core.state import fold as folding
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.state.status import STATUS_AFTER, TRANSITIONS, status_after
from opt_ops.core.values import AllocationStatus, Driver, Outcome, Shape, Status, Verdict
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.state.test_fold import NODES, tell
from tests.core.story import POLICY, Story

STORIES = 400
HAPPENINGS = (
    *(
        "train",
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
    ),
    *("lost", "waits", "daemon", "stop", "pause", "resume", "resume", "rollback", "set", "drive", "exclude"),
    *("allow", "hang", "stacks", "limit", "no_nodes", "lost_attempt", "job_ends", "refused_checkpoint", "last_step"),
)
ASKING = (*HAPPENINGS, *("ask", "answer", "answer", "answer", "later"))
"""Where a person is asked. These stories are apart, so that those above stay what they are."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Status, Status]]:
    """The edges that states take while a test runs. An edge that the table lacks fails the test by itself."""
    edges: set[tuple[Status, Status]] = set()

    def recorded(state: State, event: e.Event) -> Status | None:
        status = status_after(state, event)
        if status is not None:
            edges.add((state.status, status))
        return status

    monkeypatch.setattr(folding, "status_after", recorded)
    return edges


def ask(story: Story, verb: str, **arguments: object) -> None:
    """An operator's request goes the way of the inbox; one that makes no sense is refused there."""
    given = {"reason": "because", **arguments}
    event = event_of(story.state, Request(request=f"r{len(story.entries)}", author="ann", verb=verb, arguments=given))
    if not isinstance(event, e.RequestRefused):
        story.see(event)


def happen(story: Story, what: str, number: int) -> None:
    """More than `tell` knows: operators, hangs, time limits, checkpoints that turn out bad."""
    state, attempt, allocation = story.state, story.state.attempt, story.state.allocation
    live = attempt is not None and attempt.live
    runs = live and not attempt.stop_why
    match what:
        case "pause":
            ask(story, "pause", keep_nodes=bool(number % 2))
        case "resume":
            ask(story, "resume")
        case "rollback":
            ask(story, "change", to_step=number)
        case "set":
            ask(story, "change", lr_factor=0.5)
        case "drive":
            ask(story, "drive", driver=Driver.OPERATOR if state.driver is Driver.DAEMON else Driver.DAEMON)
        case "ask":
            terms = ({}, {"default": "wait"}, {"default": "act", "seconds": 60}, {"only": ["rollback"]})[number % 4]
            ask(story, "drive", driver=Driver.ASK, **terms)
        case "answer":
            for each in open_proposals(state):
                ask(story, "approve" if number % 2 else "decline", proposal=each.name)
        case "later":
            story.see(seconds=1900)
        case "exclude" | "allow":
            ask(story, what, node=NODES[number % len(NODES)])
        case "hang" if runs:
            story.signal("hang", attempt.last_step, None, seconds=99.0, patience=30.0, phase="training")
        case "job_ends" if runs:
            story.signal("allocation_lost", attempt.last_step, None, job="77", reason="gone")
        case "lost_attempt" if live:
            story.ends(Outcome.LOST)
        case "last_step" if live and attempt.steps:
            story.train(attempt.steps)
            story.checkpoint(attempt.steps)
            story.ends(Outcome.COMPLETED)
        case "stacks":
            waiting = [i for i in state.incidents.values() if i.stacks_at and i.stacks is None]
            for incident in waiting[:1] if live else ():
                story.see(
                    e.StacksTaken(attempt=attempt.name, incident=incident.name, groups=(), odd=(), silent=(), nodes=())
                )
        case "limit" if allocation is not None and allocation.holds:
            story.changed(allocation.name, *allocation.nodes, ends_at=story.now + number % 400)
        case "no_nodes" if allocation is not None and allocation.live and allocation.job is None:
            story.see(e.AllocationFailed(allocation=allocation.name, why="no"))
        case "refused_checkpoint":
            good = [known for known in state.checkpoints.values() if known.good]
            for known in good[-1:]:
                story.see(e.CheckpointRefused(checkpoint=known.checkpoint, why="damaged"))
        case "hang" | "job_ends" | "lost_attempt" | "last_step" | "limit" | "no_nodes":
            pass
        case _:
            tell(story, what, number)


def random_story(seed: int, happenings: Sequence[str] = HAPPENINGS) -> Story:
    draw = random.Random(seed)
    # Few actions overall: the ends of ladders are reached.
    limits = replace(POLICY.limits, actions=draw.choice([0, 1, 2, POLICY.limits.actions]))
    shape = Shape(nodes=2, spares=draw.choice([0, 1]), ranks_per_node=1, min_nodes=draw.choice([0, 1]))
    story = Story(replace(POLICY, limits=limits), shape)
    story.begin()
    if happenings is ASKING:
        happen(story, "ask", 0)
    for _ in range(draw.randint(5, 60)):
        happen(story, draw.choice(happenings), draw.randint(0, 999))
    return story


def started(driver: Driver) -> Story:
    """A lineage that another launcher or a person drives from the start: nothing is asked for by itself."""
    story = Story()
    story.daemon()
    story.see(
        e.LineageStarted(
            request="r0", author="ann", lineage="12", recipe="x", settings=(), shape=story.shape, driver=driver
        )
    )
    return story


def stopped_when(story: Story) -> None:
    ask(story, "stop")
    assert story.state.status is Status.CANCELLED


def planned_paused() -> None:
    story = started(Driver.OPERATOR)
    ask(story, "pause")
    assert story.state.status is Status.PAUSED


def preflight_without_a_good_checkpoint() -> None:
    """The only checkpoint turns out bad after more steps than may be lost unasked."""
    story = Story().training(2500, checkpoints=(2400,))
    story.rank_dies(2500)
    path = story.state.checkpoints["/runs/12/12.00/checkpoints/step-00002400"].checkpoint
    story.changed("12-n0", "n1", "n2", "n3")
    ask(story, "pause")
    story.ends(Outcome.FAILED)
    story.see(e.CheckpointRefused(checkpoint=path, why="damaged"))
    ask(story, "resume")
    story.see(seconds=20)
    story.hold()
    story.see(seconds=1000)
    assert story.state.status is Status.HALTED


def preflight_rolled_back() -> None:
    story = Story().training(450)
    ask(story, "pause")
    story.checkpoint(451)
    story.ends()
    ask(story, "resume")
    allocation = story.state.allocation
    assert allocation is not None
    story.see(e.AllocationSubmitted(allocation=allocation.name, job="78", adopted=False))
    story.changed(allocation.name, "m1", "m2", "m3")
    assert story.state.status is Status.PREFLIGHT
    ask(story, "change", to_step=200)
    assert story.state.run is not None
    assert story.state.run.name == "12.01"


def resumed_at_the_last_step() -> None:
    """A rank dies when only a snapshot holds the last step; the next attempt trains nothing and saves it."""
    story = Story().training(1000, checkpoints=(900,))
    story.checkpoint(1000, nodes=(("n1",), ("n2",)))
    story.rank_dies(1000)
    story.ends(Outcome.FAILED)
    story.see(seconds=POLICY.examine_seconds + 1)
    attempt = story.state.attempt
    assert attempt is not None
    assert (attempt.name, attempt.checkpoint.step if attempt.checkpoint else 0) == ("12.00-a1", 1000)
    story.see(e.AttemptStarted(attempt=attempt.name, at=story.now))
    story.checkpoint(1000)
    story.ends(Outcome.COMPLETED)
    assert story.state.status is Status.COMPLETED


def the_last_step_under_examination(story: Story) -> None:
    """A restart was decided when the last step was made, and its nodes are gone."""
    story.rank_dies(999)
    story.changed("12-n0", status=AllocationStatus.ENDED)
    story.ends(Outcome.LOST, last_step=1000)
    story.checkpoint(1000, verify=False)


def the_last_checkpoint_turns_out_sound(story: Story) -> None:
    assert story.state.run is not None
    path = f"/runs/12/{story.state.run.name}/checkpoints/step-00001000"
    story.see(e.CheckpointVerified(checkpoint=story.state.checkpoints[path].checkpoint, healthy=True, why=""))
    assert story.state.status is Status.COMPLETED


def completed_in_the_queue() -> None:
    story = Story().training(999, checkpoints=(900,))
    the_last_step_under_examination(story)
    assert story.state.status is Status.QUEUED
    the_last_checkpoint_turns_out_sound(story)


def completed_in_preflight() -> None:
    story = Story().training(999, checkpoints=(900,))
    the_last_step_under_examination(story)
    allocation = story.state.allocation
    assert allocation is not None
    story.see(e.AllocationSubmitted(allocation=allocation.name, job="78", adopted=False))
    story.changed(allocation.name, "m1", "m2", "m3")
    assert story.state.status is Status.PREFLIGHT
    the_last_checkpoint_turns_out_sound(story)


def paused_for_a_moment_when_the_nodes_went(story: Story) -> None:
    ask(story, "pause", keep_nodes=True)
    ask(story, "resume")
    gone = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason="")
    story.write(gone)
    story.ends(Outcome.LOST)
    story.see(seconds=20)
    assert story.state.status is Status.QUEUED


def before_the_first_step() -> Story:
    story = Story()
    story.begin()
    story.hold()
    assert story.state.status is Status.STARTING
    return story


def completed_while_paused() -> None:
    story = Story().training(1000, checkpoints=(900,))
    ask(story, "pause")
    story.checkpoint(1000, verify=False)
    story.ends(Outcome.COMPLETED)
    assert story.state.status is Status.PAUSED
    the_last_checkpoint_turns_out_sound(story)


def a_gpu_fails_while_rolling_back() -> None:
    """The rollback has spent the last action over all playbooks."""
    story = Story(replace(POLICY, limits=replace(POLICY.limits, actions=1))).training(450)
    story.spike(450, onset=440)
    story.judge("n2", Verdict.BAD, "xid_79")
    assert story.state.status is Status.HALTED


def rolled_back_by_an_operator(story: Story) -> Story:
    ask(story, "change", to_step=200)
    assert story.state.run is not None
    assert story.state.run.name == "12.01"
    return story


def waits_for_nodes() -> Story:
    story = Story().training(450)
    ask(story, "pause")
    story.checkpoint(451)
    story.ends()
    ask(story, "resume")
    assert story.state.status is Status.QUEUED
    return story


def starts_again() -> Story:
    story = Story().training(450)
    story.rank_dies(450)
    story.ends(Outcome.FAILED)
    assert story.state.status is Status.STARTING
    return story


def answered_when_the_daemon_drives_again() -> None:
    """An operator drove when the attempt died; the nodes that are held do not suffice for the next one."""
    story = Story().training(450)
    ask(story, "drive", driver=Driver.OPERATOR)
    story.rank_dies(450)
    story.ends(Outcome.FAILED)
    story.judge("n2", Verdict.SUSPECT, "xid_63")
    story.judge("n3", Verdict.SUSPECT, "xid_63")
    ask(story, "pause", keep_nodes=True)
    ask(story, "resume")
    assert story.state.status is Status.PREFLIGHT
    ask(story, "drive", driver=Driver.DAEMON)
    assert story.state.incidents["12-i001"].decision is not None


def ranks_replaced_in_place() -> None:
    story = Story().training(450)
    story.rank_dies(450)
    assert story.state.status is Status.RECOVERING
    nodes = ("n1", "n3")
    story.see(e.MembersIntended(attempt="12.00-a0", generation=2, nodes=nodes, new=(1,), incident="12-i000"))
    story.see(e.MembersJoined(attempt="12.00-a0", generation=2, step=450, at=story.now))
    assert_status(story, Status.TRAINING)


RARE: tuple[Callable[[], None], ...] = (
    lambda: stopped_when(started(Driver.OPERATOR)),
    planned_paused,
    lambda: assert_status(started(Driver.SHADOW), Status.STARTING),
    preflight_without_a_good_checkpoint,
    preflight_rolled_back,
    resumed_at_the_last_step,
    completed_in_the_queue,
    completed_in_preflight,
    completed_while_paused,
    lambda: paused_for_a_moment_when_the_nodes_went(before_the_first_step()),
    lambda: paused_for_a_moment_when_the_nodes_went(Story().training(450)),
    a_gpu_fails_while_rolling_back,
    lambda: assert_status(rolled_back_by_an_operator(waits_for_nodes()), Status.ROLLING_BACK),
    lambda: assert_status(rolled_back_by_an_operator(starts_again()), Status.ROLLING_BACK),
    lambda: stopped_when(rolled_back_by_an_operator(Story().training(450))),
    lambda: stopped_when(Story().training(450)),
    answered_when_the_daemon_drives_again,
    ranks_replaced_in_place,
)


def assert_status(story: Story, status: Status) -> None:
    assert story.state.status is status


def test_every_edge_is_taken_by_a_story_and_no_story_takes_another(taken: set[tuple[Status, Status]]):
    for story in RARE:
        story()
    for seed in range(STORIES):
        random_story(seed)
    assert taken == set(TRANSITIONS)


def test_whatever_is_answered_a_decision_is_taken_once_and_no_edge_is_new(taken: set[tuple[Status, Status]]):
    asked = 0
    for seed in range(STORIES // 4):
        story = random_story(seed, ASKING)
        told = [entry.event for entry in story.entries]
        answers = Counter(event.proposal for event in told if isinstance(event, e.ProposalAnswered))
        fell_back = {event.incident for event in told if isinstance(event, e.MembersFailed)}
        decided = Counter(event.incident for event in told if isinstance(event, e.RecoveryDecided))
        assert max(answers.values(), default=1) == 1
        assert all(count == 1 or incident in fell_back for incident, count in decided.items())
        for incident in story.state.incidents.values():
            waits = [each for each in incident.proposals if each.answer is None]
            assert waits in ([], [incident.proposal])
            assert not waits or incident.decision is None
        asked += len(answers)
    assert asked > STORIES // 8
    assert taken <= set(TRANSITIONS)


def test_every_edge_has_its_reason():
    assert all(reason and len(reason) < 90 for reason in TRANSITIONS.values())
    assert all(before not in (Status.COMPLETED, Status.CANCELLED) for before, _ in TRANSITIONS)


def test_a_new_event_kind_is_a_visible_choice():
    """Every other kind leaves the status alone."""
    assert sorted(kind for kind, event in e.KINDS.items() if event not in STATUS_AFTER) == sorted(
        [
            *("afterthought_added", "alert_intended", "alert_settled", "allocation_failed", "allocation_submitted"),
            "attempt_configured",
            *(
                "attempt_started",
                "changes_declared",
                "checkpoint_refused",
                "checkpoint_seen",
                "checkpoint_verified",
                "checkpoints_gone",
            ),
            *("daemon_started", "drain_intended", "drill_done", "drill_requested", "driver_changed", "energy_metered"),
            *("incident_closed", "incident_opened", "leave_intended", "node_allowed", "node_drained", "node_excluded"),
            *("node_judged", "note_added", "pause_requested", "release_intended", "request_refused", "run_planned"),
            *("signal_raised", "size_decided", "stacks_intended", "stacks_taken", "stop_requested"),
            *("probe_ended", "probes_intended", "probes_judged", "proposal_answered", "proposal_made"),
            *("members_failed", "members_intended", "standby_seen"),
            *("checkpoint_evaluated", "checkpoint_sampled", "evaluation_ended", "evaluation_intended"),
            *("stray_cancelled", "stray_found", "input_left_out", "watcher_failed", "watcher_recovered"),
        ]
    )
