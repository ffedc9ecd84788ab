"""Slow nodes are named by whom they were measured with: any one or two among N, and nobody when all are equal."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.health.burn_in_plan import GroupMeasurement, Slow, named, next_round, slower

WEATHER = st.floats(0.98, 1.02)  # the same link, measured again


def measure(speeds: dict[str, float], draw: st.DataObject) -> tuple[list[Slow], list[Sequence[GroupMeasurement]]]:
    """All rounds; the slowest of a group sets its pace."""
    rounds: list[Sequence[GroupMeasurement]] = []
    while groups := next_round(list(speeds), rounds):
        members = [node for group in groups for node in group]
        assert len(members) == len(set(members)), "no node is in two groups at once"
        rounds.append(
            [
                GroupMeasurement(nodes=group, gbs=(min(speeds[node] for node in group) * draw.draw(WEATHER)) or None)
                for group in groups
            ]
        )
        assert len(rounds) <= 8
    return named(list(speeds), rounds), rounds


@given(count=st.integers(4, 20), data=st.data())
def test_any_one_or_two_slow_nodes_are_named(count: int, data: st.DataObject):
    nodes = [f"n{i}" for i in range(count)]
    slow = data.draw(st.dictionaries(st.sampled_from(nodes), st.floats(0.0, 0.8), min_size=1, max_size=2))
    found, _ = measure({node: 100 * slow.get(node, 1.0) for node in nodes}, data)
    assert {each.name for each in found} == set(slow)


@given(slow=st.integers(0, 2), factor=st.floats(0.0, 0.8), data=st.data())
def test_one_slow_node_of_three_is_named(slow: int, factor: float, data: st.DataObject):
    found, _ = measure({f"n{i}": 100 * (factor if i == slow else 1.0) for i in range(3)}, data)
    assert [each.name for each in found] == [f"n{slow}"]


@given(count=st.integers(1, 20), data=st.data())
def test_nobody_is_named_when_all_are_equal(count: int, data: st.DataObject):
    found, rounds = measure({f"n{i}": 100.0 for i in range(count)}, data)
    assert found == []
    if count >= 6 and count % 2 == 0:
        assert len(rounds) == 1, "and a large healthy fleet is done after one round"


@given(count=st.integers(6, 20), data=st.data())
def test_suspects_are_measured_again_with_good_ones_only(count: int, data: st.DataObject):
    nodes = [f"n{i}" for i in range(count)]
    slow = data.draw(st.sampled_from(nodes))
    _, rounds = measure({node: 30.0 if node == slow else 100.0 for node in nodes}, data)
    assert len(rounds) == 2
    for each in rounds[1]:
        assert slow not in each.nodes[1:], "the second of a pair is a good one"


def test_of_two_nodes_nobody_can_say_which():
    rounds = [[GroupMeasurement(nodes=("n1", "n2"), gbs=1.0)]]
    assert next_round(["n1", "n2"], rounds) == []
    assert named(["n1", "n2"], rounds) == []


def test_a_network_that_nowhere_works_is_no_nodes_fault():
    nodes = [f"n{i}" for i in range(6)]
    rounds = [[GroupMeasurement(nodes=(nodes[i], nodes[i + 1]), gbs=None) for i in (0, 2, 4)]]
    assert next_round(nodes, rounds) == []
    assert named(nodes, rounds) == []


def test_slower_means_by_a_tenth_or_by_the_usual_spread():
    assert slower({"a": 100.0, "b": 100.0, "c": 91.0}) == []
    assert slower({"a": 100.0, "b": 100.0, "c": 89.0}) == [Slow(name="c", value=89.0, median=100.0)]
    noisy = {"a": 60.0, "b": 80.0, "c": 100.0, "d": 120.0, "e": 140.0}
    assert [each.name for each in slower(noisy)] == ["a"], "the median deviation is 20"
    assert slower({"a": 100.0, "b": 1.0}) == []
