"""What is remembered of pure functions."""

from __future__ import annotations

from opt_ops.core.memo import KEPT, memoize_recent


def test_each_of_several_states_is_computed_once_and_memory_is_bounded():
    computed: list[list[int]] = []

    @memoize_recent
    def total(values: list[int]) -> int:
        computed.append(values)
        return sum(values)

    states = [[number] for number in range(KEPT)]
    for _ in range(3):
        assert [total(each) for each in states] == list(range(KEPT))
    assert len(computed) == KEPT, "as a daemon asks: for one lineage after the other, in each tick"
    equal = [0]
    assert total(equal) == 0
    assert computed[-1] is equal, "another object may change at another time"
    assert total(states[-1]) == KEPT - 1
    assert len(computed) == KEPT + 1
    assert total(states[0]) == 0
    assert len(computed) == KEPT + 2, "the one that was asked for longest ago is forgotten"
