"""Place before node: a failure that comes back at the same step on other nodes is the program's."""

import pytest

from opt_ops.core import events as e
from opt_ops.core.failures.classify_exit import blame
from opt_ops.core.values import Action, RankExit, Shape, Verdict
from opt_ops.supervise.exits import evidence_of, places
from tests.core.story import Story

ILLEGAL = "RuntimeError: CUDA error: an illegal memory access was encountered"
ASSERT = "RuntimeError: CUDA error: device-side assert triggered"
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"


def story() -> Story:
    told = Story(shape=Shape(nodes=2, spares=4, ranks_per_node=1))
    told.begin()
    told.hold("n1", "n2", "n3", "n4", "n5", "n6")
    told.train(50)
    return told


def fails(
    told: Story, said: str, *, step: int = 50, ranks: tuple[int, ...] = (0,), xids: tuple[int, ...] = ()
) -> e.Event:
    """Ranks of the newest attempt end at a step, each with this last line. Returns the decision."""
    nodes = told.state.attempt.nodes
    exits = {RankExit(rank=rank, node=nodes[rank], code=1, signal=None, at=told.now): said for rank in ranks}
    found = blame(exits)
    evidence = {**evidence_of(found, len(exits)), **({"xids": xids} if xids else {})}
    decided = told.signal(str(found.kind), step, None, places(found), **evidence)
    return next(each for each in decided if isinstance(each, e.RecoveryDecided))


def again(told: Story, step: int = 50) -> None:
    """The attempt ends, and the next one comes as far as the failed one."""
    told.ends()
    told.train(step)


def excluded(told: Story) -> list[str]:
    return [name for name, node in told.state.nodes.items() if node.excluded_by]


def drained(told: Story) -> list[str]:
    return [entry.event.node for entry in told.entries if isinstance(entry.event, e.DrainIntended)]


def test_the_same_text_on_every_node_takes_one_node_and_halts_at_the_third():
    told = story()
    assert fails(told, ILLEGAL).exclude == ("n1",)
    again(told)
    assert told.state.attempt.nodes[0] == "n2"
    second = fails(told, f"[rank0]: {ILLEGAL} 0x7f12")
    assert (second.action, second.exclude) == (Action.RESTART, ())
    again(told)
    third = fails(told, ILLEGAL)
    assert (third.action, third.exclude) == (Action.HALT, ())
    assert "the program fails at step 50 on different nodes (n1, n2)" in told.state.why
    assert (excluded(told), drained(told)) == (["n1"], [])


def test_two_ranks_of_different_nodes_take_no_node():
    told = story()
    decided = fails(told, ILLEGAL, ranks=(0, 1))
    assert (decided.action, decided.exclude) == (Action.RESTART, ())
    incident = next(iter(told.state.incidents.values()))
    assert incident.nodes == ()
    assert incident.cause.startswith("rank 0 on n1 left with code 1 (2 ranks on 2 nodes ended so): RuntimeError")


def test_an_assertion_of_the_program_takes_no_node_and_halts_at_the_third():
    told = story()
    for _ in range(2):
        decided = fails(told, ASSERT)
        assert (decided.action, decided.exclude) == (Action.RESTART, ())
        again(told)
    assert fails(told, ASSERT).action is Action.HALT
    assert "the program fails at step 50" in told.state.why
    assert (excluded(told), drained(told)) == ([], [])


@pytest.mark.parametrize("xid", [79, 48, 95, 64, 119])
def test_an_xid_that_condemns_the_card_drains_the_node(xid: int):
    told = story()
    fails(told, ILLEGAL)
    assert drained(told) == []
    told.judge("n1", Verdict.BAD, f"xid_{xid}")
    assert (excluded(told), drained(told)) == (["n1"], ["n1"])


def test_an_xid_before_the_death_is_the_cause():
    told = story()
    told.judge("n1", Verdict.BAD, "xid_79")
    assert (excluded(told), drained(told)) == (["n1"], ["n1"])


@pytest.mark.parametrize("xids", [(31,), (13,), (13, 45)])
def test_an_xid_of_the_program_takes_no_node(xids: tuple[int, ...]):
    told = story()
    for _ in range(2):
        assert fails(told, ILLEGAL, xids=xids).exclude == ()
        again(told)
    assert fails(told, ILLEGAL, xids=xids).action is Action.HALT
    assert (excluded(told), drained(told)) == ([], [])


def test_errors_at_other_steps_or_with_other_words_are_no_sign_of_the_program():
    told = story()
    fails(told, ILLEGAL)
    again(told)
    assert fails(told, ECC).exclude == ("n2",), "another error"
    again(told)
    assert fails(told, ILLEGAL, step=53).exclude == ("n3",), "another step"
    assert drained(told) == []


def test_a_rank_that_only_dies_again_on_its_node_leaves_the_node_out():
    told = story()
    assert fails(told, "").exclude == ()
    again(told)
    assert fails(told, "").exclude == ("n1",)
    again(told)
    assert told.state.attempt.nodes[0] == "n2"
    assert fails(told, "", step=60).action is Action.RESTART
    assert drained(told) == []
