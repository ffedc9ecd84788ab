"""Lost ranks are replaced in place, or the attempt is restarted: what is decided, when, and why."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from opt_ops.contract.replacing import CAPABILITY, buddies
from opt_ops.core import events as e
from opt_ops.core.decide.members import MOST_GENERATIONS
from opt_ops.core.state.model import Incident
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver, Outcome, Shape, Verdict
from tests.core.story import OPTIMIZER, POLICY, Story, kinds, only
from trainer.checkpoint import peer_copies

FOUR = Shape(nodes=4, spares=2, ranks_per_node=2)


def capable(shape: Shape | None = None, step: int = 450, ready: int = 1) -> Story:
    """A lineage that trains, with warm ranks on its spares."""
    story = Story(shape=shape)
    story.capabilities = (CAPABILITY,)
    shape = story.shape
    names = [f"n{number + 1}" for number in range(shape.nodes + shape.spares)]
    story.begin()
    story.hold(*names)
    story.train(step)
    for each in (100, 200, 300, 400):
        story.checkpoint(each)
    story.standbys(**dict.fromkeys(names[shape.nodes :], ready * shape.ranks_per_node))
    return story


def decided(events: list[e.Event]) -> e.RecoveryDecided:
    return only(events, e.RecoveryDecided)


def incident(story: Story, name: str = "12-i000") -> Incident:
    return story.state.incidents[name]


def lose(story: Story, *ranks: int, kind: str = "process_death", **evidence: object) -> list[e.Event]:
    """Processes of these ranks end by SIGKILL."""
    attempt = story.state.attempt
    assert attempt is not None
    nodes = attempt.nodes_of(ranks)[:1]
    found = {"rank": ranks[0], "code": None, "signal": 9, "lost_ranks": list(ranks), **evidence}
    return story.signal(kind, attempt.last_step, None, nodes, **found)


def test_a_dead_rank_is_replaced_by_a_spare_and_nothing_is_stopped():
    story = capable()
    events = lose(story, 1)
    assert kinds(events) == ["incident_opened", "recovery_decided", "members_intended"]
    recovery = decided(events)
    assert (recovery.action, recovery.rung, recovery.nodes, recovery.ranks) == (
        *(Action.REPLACE_RANKS, 0),
        *(("n1", "n3"), (1,)),
    )
    assert recovery.why == "n3 takes the place of n2"
    assert story.state.status is Status.RECOVERING
    attempt = story.state.attempt
    assert (attempt.nodes, attempt.generation, attempt.nodes_in(1)) == (("n1", "n3"), 2, ("n1", "n2"))
    assert story.joins(451, kept=1) == []
    assert story.state.status is Status.TRAINING
    closed = only(story.train(456), e.IncidentClosed)
    assert (closed.proven, closed.step_resumed, closed.steps_lost) == (True, 451, 0)
    shown = {name: closed.proof[name] for name in ("generation", "ranks_replaced", "pids_kept", "steps_repeated")}
    assert shown == {"generation": 2, "ranks_replaced": [1], "pids_kept": True, "steps_repeated": 0}
    assert closed.proof["first_step"] == 452
    assert closed.seconds_down > 0
    assert len(story.state.attempts) == 1


def test_an_understudy_takes_the_place_on_its_own_node():
    story = capable(FOUR)
    story.standbys(n2=1)
    recovery = decided(lose(story, 3))
    assert (recovery.nodes, recovery.ranks) == (("n1", "n2", "n3", "n4"), (3,))
    assert recovery.why == "rank 3 starts again where it was"


def test_a_node_that_is_not_fit_is_left_with_all_its_ranks():
    story = capable(FOUR)
    story.standbys(n2=1)
    story.judge("n2", Verdict.SUSPECT, "xid_63")
    recovery = decided(lose(story, 3))
    assert (recovery.nodes, recovery.ranks) == (("n1", "n5", "n3", "n4"), (2, 3))


@pytest.mark.parametrize(
    ("tell", "exclude"),
    [
        (lambda s: s.judge("n2", Verdict.BAD, "xid_79"), ("n2",)),
        (lambda s: s.signal("silent_node", 450, None, ("n2",), seconds=30.0), ("n2",)),
        (lambda s: s.signal("straggler", 450, 400, ("n2",), rank=2, ratio=1.5), ("n2",)),
    ],
    ids=["bad_gpu", "silent_node", "straggler"],
)
def test_a_node_is_replaced_as_a_whole_and_excluded(tell: Callable[[Story], list[e.Event]], exclude: tuple[str, ...]):
    story = capable(FOUR)
    events = tell(story)
    recovery = decided(events)
    assert (recovery.action, recovery.nodes, recovery.ranks, recovery.exclude, recovery.save_first) == (
        *(Action.REPLACE_RANKS, ("n1", "n5", "n3", "n4")),
        *((2, 3), exclude, False),
    )
    assert "stop_intended" not in kinds(events)
    assert "leave_intended" not in kinds(events)
    assert only(events, e.NodeExcluded).node == "n2"
    story.joins(450, kept=6)
    (closed,) = [each for each in story.train(456) if isinstance(each, e.IncidentClosed)]
    assert closed.proven, closed.proof


def test_the_odd_ranks_of_a_hang_are_replaced_with_their_node():
    story = capable(FOUR)
    story.signal("hang", 450, 450, seconds=99.0, patience=30.0, phase="training")
    attempt = story.state.attempt
    stacks = e.StacksTaken(attempt=attempt.name, incident="12-i000", groups=(), odd=(6,), silent=(6,), nodes=("n4",))
    recovery = decided(story.see(stacks))
    assert (recovery.action, recovery.nodes, recovery.ranks) == (
        *(Action.REPLACE_RANKS, ("n1", "n2", "n3", "n5")),
        (6, 7),
    )


def test_a_hang_in_which_no_rank_stands_out_is_a_restart():
    story = capable(FOUR)
    story.signal("hang", 450, 450, seconds=99.0, patience=30.0, phase="training")
    attempt = story.state.attempt
    stacks = e.StacksTaken(attempt=attempt.name, incident="12-i000", groups=(), odd=(), silent=(), nodes=())
    recovery = decided(story.see(stacks))
    assert (recovery.action, recovery.rung) == (Action.RESTART, 1)
    assert "the stacks name no node that hangs alone" in recovery.why


def off(story: Story) -> None:
    story.policy = replace(story.policy, in_place=False)


def paused(story: Story) -> None:
    story.see(e.PauseRequested(request="r9", author="ann", reason="because"))


@pytest.mark.parametrize(
    ("change", "ranks", "why"),
    [
        (lambda s: s.standbys(n5=1, n6=0), (1,), "no spare node is fit with 2 warm ranks to take the place of n1"),
        (lambda s: s.judge("n5", Verdict.SUSPECT, "x") + s.standbys(n6=0), (1,), "no spare node is fit"),
        (lambda _: None, (0, 4), "rank 0 is lost, and so is rank 4, which keeps its copy"),
        (lambda _: None, (0, 2, 6), "more than 2 nodes are hit"),
    ],
    ids=["no_standby", "unfit_spare", "pair", "three_nodes"],
)
def test_the_decision_says_why_it_is_a_restart(change: Callable[[Story], object], ranks: tuple[int, ...], why: str):
    story = capable(FOUR)
    change(story)
    recovery = decided(lose(story, *ranks))
    assert (recovery.action, recovery.rung) == (Action.RESTART, 1)
    assert recovery.why.startswith("not in place: ")
    assert why in recovery.why


def test_after_the_last_step_nothing_is_replaced():
    story = capable(FOUR)
    story.train(1000)
    assert kinds(lose(story, 1)) == ["incident_opened"], "the checkpoint of the last step comes first"
    assert decided(story.checkpoint(1000)).action is Action.COMPLETE


def incapable(story: Story) -> None:
    story.write(
        replace(next(x.event for x in story.entries if isinstance(x.event, e.AttemptConfigured)), capabilities=())
    )


@pytest.mark.parametrize("change", [off, incapable])
def test_without_it_nothing_is_said_of_it(change: Callable[[Story], None]):
    story = capable(FOUR)
    change(story)
    recovery = decided(lose(story, 1))
    assert (recovery.action, recovery.rung, recovery.nodes, recovery.ranks) == (Action.RESTART, 1, (), ())
    assert recovery.why == "0 of 12 actions in 24 h spent before this one"


@pytest.mark.parametrize("kind", ["user_error", "out_of_memory", "silent_data_corruption", "non_finite_loss"])
def test_what_may_be_wrong_everywhere_is_never_replaced_in_place(kind: str):
    story = capable(FOUR)
    assert decided(lose(story, 1, kind=kind, code=78)).action is not Action.REPLACE_RANKS


def test_before_the_first_step_it_is_a_restart():
    story = Story(shape=FOUR)
    story.capabilities = (CAPABILITY,)
    story.begin()
    story.hold("n1", "n2", "n3", "n4", "n5", "n6")
    story.standbys(n5=2, n6=2)
    attempt = story.state.attempt
    story.see(
        e.AttemptStarted(attempt=attempt.name, at=story.now),
        e.AttemptConfigured(
            attempt=attempt.name,
            steps=1000,
            schedule=story.schedule,
            optimizer=OPTIMIZER,
            versions={},
            layout={},
            capabilities=(CAPABILITY,),
        ),
    )
    recovery = decided(lose(story, 1))
    assert recovery.action is Action.RESTART
    assert "has made no step yet" in recovery.why


def test_an_operator_who_drives_gets_advice_and_no_replacement():
    story = capable(FOUR)
    story.see(e.DriverChanged(request="r8", author="ann", reason="because", driver=Driver.OPERATOR))
    recovery = decided(lose(story, 1))
    assert recovery.advice
    assert story.state.attempt.generation == 1


# ---- a second loss, and falling back


def test_a_second_loss_is_the_next_generation_of_the_same_incident():
    story = capable(FOUR)
    lose(story, 1)
    assert story.state.attempt.nodes == ("n5", "n2", "n3", "n4")
    again = lose(story, 2)
    assert kinds(again) == ["members_intended"]
    order = only(again, e.MembersIntended)
    assert (order.generation, order.nodes, order.new) == (3, ("n5", "n6", "n3", "n4"), (0, 1, 2, 3))
    assert len(story.state.incidents) == 1
    story.joins(450, kept=4)
    (closed,) = [each for each in story.train(456) if isinstance(each, e.IncidentClosed)]
    assert (closed.proven, closed.proof["ranks_replaced"]) == (True, [0, 1, 2, 3])
    assert story.see(seconds=500.0) == [], "the losses are answered"


def test_a_node_found_bad_meanwhile_is_absorbed_and_excluded_as_a_spare_afterwards():
    story = capable(FOUR)
    lose(story, 1)
    events = story.judge("n2", Verdict.BAD, "xid_79")
    assert only(events, e.MembersIntended).nodes == ("n5", "n6", "n3", "n4")
    recoveries = [each for each in events if isinstance(each, e.RecoveryDecided)]
    assert [each.action for each in recoveries] == [Action.EXCLUDE]
    assert story.state.nodes["n2"].excluded_by == "12-i001"
    assert story.state.attempt.stop_why is None


def falls_back(events: list[e.Event], why: str) -> None:
    assert kinds(events)[:3] == ["members_failed", "recovery_decided", "stop_intended"]
    assert why in only(events, e.MembersFailed).why
    recovery = decided(events)
    assert (recovery.action, recovery.rung) == (Action.RESTART, 1)
    assert why in recovery.why


@pytest.mark.parametrize(
    ("happen", "why"),
    [
        (lambda s: s.see(seconds=POLICY.in_place_seconds + 1), "not all ranks had joined 120 s after the first order"),
        (lambda s: lose(s, 4), "rank 0 is lost, and so is rank 4"),
        (lambda s: s.standbys(n6=0) + lose(s, 2), "no spare node is fit"),
        (lambda s: lose(s, 3, kind="communication", code=88, signal=None, codes=[88]), "no common step"),
        (lambda s: lose(s, 0, kind="user_error", code=78, signal=None, codes=[78]), "user_error"),
        (lambda s: lose(s, 0, 1, 2, 3, 4, 5, 6, 7), "no spare node is fit"),
    ],
    ids=["deadline", "pair", "no_standby", "no_common_step", "user_error", "all"],
)
def test_a_replacement_that_cannot_come_together_is_a_restart_at_once(
    happen: Callable[[Story], list[e.Event]], why: str
):
    story = capable(FOUR)
    lose(story, 1)
    falls_back(happen(story), why)
    assert incident(story).fell_back is not None
    launched = only(story.ends(), e.AttemptIntended)
    assert launched.attempt == "12.00-a1"
    (closed,) = [each for each in story.train(460) if isinstance(each, e.IncidentClosed)]
    assert (closed.incident, closed.proven, closed.steps_lost) == ("12-i000", True, 50)


def test_losses_again_and_again_are_a_restart():
    story = capable(Shape(nodes=8, spares=8, ranks_per_node=1))
    assert "members_intended" in kinds(lose(story, 0))
    for rank in range(1, MOST_GENERATIONS):
        assert kinds(lose(story, rank)) == ["members_intended"]
    falls_back(lose(story, MOST_GENERATIONS), "ranks were lost again after 3 orders")


def test_the_deadline_counts_from_the_first_order():
    story = capable(FOUR)
    lose(story, 1)
    story.now += POLICY.in_place_seconds - 5
    assert kinds(lose(story, 2)) == ["members_intended"]
    falls_back(story.see(seconds=6.0), "not all ranks had joined")


def test_an_attempt_that_ends_meanwhile_is_a_restart():
    story = capable(FOUR)
    lose(story, 1)
    events = story.ends(Outcome.FAILED)
    assert kinds(events)[:3] == ["members_failed", "recovery_decided", "attempt_intended"]


def test_once_joined_that_loss_calls_for_no_restart():
    story = capable(FOUR)
    lose(story, 1)
    story.joins(450, kept=6)
    assert story.see(seconds=10 * POLICY.in_place_seconds) == []
    assert story.state.attempt.stop_why is None


def test_a_loss_after_the_join_is_another_incident():
    story = capable(FOUR)
    lose(story, 1)
    story.joins(450, kept=6)
    events = lose(story, 4)
    assert only(events, e.IncidentOpened).incident == "12-i001"
    assert only(events, e.MembersIntended).generation == 3
    story.joins(450, kept=6)
    closed = [each for each in story.train(456) if isinstance(each, e.IncidentClosed)]
    assert [(each.incident, each.proven) for each in closed] == [("12-i000", True), ("12-i001", True)]


def test_a_second_failure_at_the_same_place_is_a_restart_and_one_elsewhere_is_not():
    story = capable(Shape(nodes=4, spares=4, ranks_per_node=1))
    for rank, action in ((1, Action.REPLACE_RANKS), (2, Action.REPLACE_RANKS), (1, Action.RESTART)):
        recovery = decided(lose(story, rank))
        assert recovery.action is action, recovery.why
        if action is Action.REPLACE_RANKS:
            last = story.state.attempt.last_step
            story.joins(last)
            story.train(last + 6)
    assert recovery.rung == 1
    assert "12-i000 was at the same place" in recovery.why


def test_replacements_have_a_budget_of_their_own():
    story = capable(Shape(nodes=4, spares=2, ranks_per_node=1))
    page = story.policy.playbooks["process_death"]
    page = replace(page, in_place=replace(page.in_place, actions=1), budget=replace(page.budget, actions=1))
    story.policy = replace(story.policy, playbooks={**story.policy.playbooks, "process_death": page})
    lose(story, 1)
    story.joins(450)
    story.train(456)
    recovery = decided(lose(story, 2))
    assert recovery.action is Action.RESTART
    assert "1 of 1 replacements of ranks in 24 h are spent; 0 of 1 actions in 24 h spent" in recovery.why


def test_a_pause_waits_until_the_ranks_have_joined():
    story = capable(FOUR)
    lose(story, 1)
    paused(story)
    assert story.state.attempt.leave_at is None
    story.joins(450)
    assert story.state.attempt.leave_at is not None


def test_an_operators_rollback_ends_the_replacement():
    story = capable(FOUR)
    lose(story, 1)
    story.see(e.ChangeRequested(request="r7", author="ann", reason="because", to_step=200))
    assert story.state.attempt.stop_why is not None
    assert story.state.attempt.members[-1].failed is not None
    story.ends()
    assert story.state.attempt.name == "12.01-a0"


@pytest.mark.parametrize(
    ("joined", "first", "kept", "proven"),
    [(450, 451, 6, True), (451, 451, 6, False), (450, 452, 6, False), (450, 451, 5, False), (450, 451, None, True)],
    ids=["as_computed", "a_step_twice", "a_step_missing", "a_process_is_new", "pids_not_known"],
)
def test_what_proves_a_replacement(joined: int, first: int, kept: int | None, proven: bool):
    story = capable(FOUR)
    lose(story, 1)
    story.joins(joined, kept=kept)
    twin = capable(FOUR, step=first - 1)
    lose(twin, 1)
    twin.joins(first - 1)
    twin.train(first + 5)  # what it says of its steps is right
    story.see(next(x.event for x in reversed(twin.entries) if isinstance(x.event, e.AttemptProgressed)))
    assert incident(story).proven is proven


def test_the_trainer_and_the_supervisor_have_the_same_buddies():
    for nodes in (["a"], ["a", "a"], ["a", "a", "b", "b"], ["a", "b", "c"], ["a", "a", "b", "b", "c", "c", "d", "d"]):
        assert buddies(nodes) == peer_copies.buddies(nodes)


# ---- random histories


def happen(story: Story, draw: random.Random) -> None:
    attempt = story.state.attempt
    assert attempt is not None
    runs = attempt.live and attempt.stop_why is None
    match draw.choice(
        ("lose", "lose", "join", "join", "train", "wait", "bad", "warm", "end", "daemon", "hang", "silent")
    ):
        case "lose" if runs:
            lose(story, *draw.sample(range(8), draw.choice((1, 1, 2))))
        case "join" if attempt.rejoining is not None and runs:
            story.joins(attempt.last_step or 0)
        case "train" if runs and attempt.rejoining is None:
            story.train(min(999, (attempt.last_step or 450) + draw.randint(1, 60)))
        case "wait":
            story.see(seconds=draw.choice((1.0, 50.0, 130.0)))
        case "bad":
            story.judge(draw.choice(attempt.nodes), Verdict.BAD, "xid_79")
        case "warm":
            story.standbys(**{f"n{number}": draw.choice((0, 1, 2)) for number in range(1, 9)})
        case "end" if attempt.live:
            story.ends(Outcome.FAILED)
        case "daemon":
            story.daemon(blind=3.0)
        case "hang" if runs:
            story.signal("hang", attempt.last_step, attempt.last_step, seconds=99.0, patience=30.0, phase="training")
        case "silent" if runs:
            story.signal("silent_node", attempt.last_step, None, (draw.choice(attempt.nodes),), seconds=30.0)
        case _:
            pass


@pytest.mark.parametrize("seed", range(30))
def test_never_both_joined_and_restarted_and_every_order_ends(seed: int):
    draw = random.Random(seed)
    story = capable(Shape(nodes=4, spares=4, ranks_per_node=2))
    for _ in range(40):
        happen(story, draw)
        if story.state.ended:
            break
    story.see(seconds=2 * POLICY.in_place_seconds)
    for attempt in story.state.attempts.values():
        told = [x.event for x in story.entries if getattr(x.event, "attempt", None) == attempt.name]
        orders = [event for event in told if isinstance(event, e.MembersIntended)]
        assert [event.generation for event in orders] == list(range(2, len(orders) + 2)), (
            "each generation is ordered once"
        )
        failed = [each for each in attempt.members if each.failed is not None]
        assert not any(each.joined_at is not None for each in failed)
        assert len(failed) <= 1
        assert not failed or attempt.stop_why is not None or not attempt.live
        assert attempt.rejoining is None or not attempt.live or attempt.stop_why is not None or story.state.ended
        for before, after in zip(attempt.members, attempt.members[1:], strict=False):
            assert before.joined_at is not None or set(before.new) <= set(after.new), "who has no state starts again"
        per_incident = [each.incident for each in attempt.members]
        assert all(per_incident.count(name) <= MOST_GENERATIONS for name in per_incident)
