"""Peer copies between real processes over gloo: what is confirmed is never lost, whoever dies where."""

import random
import time
from collections.abc import Sequence

import pytest
import torch

from opt_ops.contract.replacing import buddies
from tests.trainer.recovery.crew import Crew, Plan
from trainer.checkpoint.hand_over import Holding, common, to_buddies, to_new
from trainer.checkpoint.versions import Slots, checksum
from trainer.plan.peer_copies import interval

FOUR = ["n0", "n1", "n2", "n3"]


def recovered(crew: Crew) -> int:
    """All ranks join at one step, which is the last that was confirmed or the one after. Then they train on."""
    steps = crew.told("joined")
    assert len(set(steps)) == 1, steps
    assert crew.confirmed <= steps[0] <= crew.confirmed + crew.plan.every, (steps, crew.confirmed)
    return steps[0]


def finished(crew: Crew) -> None:
    """All ranks train to the end, and each then holds the last versions of itself and of its ward."""
    last = crew.told("done")
    steps = {tuple(own[-1:]) for own, _ in last} | {tuple(held[-1:]) for _, wards in last for held in wards.values()}
    assert len(steps) == 1
    assert {ward for _, wards in last for ward in wards} == set(range(len(crew.nodes)))


def test_a_buddy_is_half_way_round() -> None:
    assert buddies(["a", "a", "b", "b", "c", "c", "d", "d"]) == [4, 5, 6, 7, 0, 1, 2, 3]
    assert buddies(["a", "b", "c"]) == [1, 2, 0]
    assert buddies(["a"] * 4) == [2, 3, 0, 1]
    assert buddies(["a", "a", "b"]) == [2, 2, 0]
    assert buddies(["a"]) == [None]
    assert buddies(["b", "a", "b", "a"]) == [1, 0, 3, 2]  # nodes in the order of their first rank


def test_how_often_a_copy_is_made() -> None:
    # 175B on 992 GPUs: 0.19 s of copies in steps of 20.9 s. Then steps that are too short for a copy.
    assert [interval(0.191, 20.9), interval(5.0, 10.0), interval(5.1, 10.0), interval(50.0, 10.0)] == [1, 1, 2, 10]


@pytest.mark.parametrize("nodes", [FOUR, ["a", "a", "b", "b"], ["a"] * 2, ["a", "b", "c"]], ids="-".join)
def test_everybody_holds_two_versions_of_itself_and_of_its_ward(nodes: Sequence[str]) -> None:
    with Crew(nodes, plan=Plan(steps=5)) as crew:
        of = buddies(nodes)
        for rank, (own, wards) in enumerate(crew.told("done")):
            assert own == [4, 5]
            assert wards == {ward: [4, 5] for ward, buddy in enumerate(of) if buddy == rank}
        assert crew.confirmed == 5


# In step 3 a rank makes its third round of calls: a head, five parts and the header go out, and as many come in.
PLACES = {
    "before its update": (1, "update", 3),
    "before it sends": (1, "copy", 3),
    "before its first message": (1, "isend", 15),
    "between two parts": (1, "isend", 18),
    "before the head comes": (1, "recv", 3),
    "while it receives": (1, "irecv", 15),
    "before it confirms": (1, "confirm", 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_dies_in_a_copy_costs_no_confirmed_step(place: str) -> None:
    victim = len(place) % 4
    with Crew(FOUR, {victim: Plan(dies=PLACES[place])}) as crew:
        crew.replace(victim)
        assert recovered(crew) in (2, 3)
        finished(crew)


def test_the_common_step_is_the_one_that_all_have_where_survivors_are_uneven() -> None:
    # Ranks 0, 1 and 3 make step 3 and copy it. Rank 2 does not: its reduction breaks, after it has helped the others.
    with Crew(FOUR, {2: Plan(loses=(1, 3))}) as crew:
        crew.until_kept(3, 0, 1, 3)
        crew.kill(1)
        crew.go(2)
        crew.replace(1)
        assert recovered(crew) == 2
        finished(crew)


def test_a_confirmation_that_only_some_heard_counts() -> None:
    with Crew(FOUR, {0: Plan(unheard=(1, 3)), 2: Plan(dies=(1, "update", 4))}) as crew:
        crew.told("lost", 0)
        crew.replace(2)
        assert recovered(crew) == 3
        assert crew.confirmed == 3
        finished(crew)


def test_a_pair_that_is_lost_leaves_no_common_step_on_all_alike() -> None:
    with Crew(FOUR, {rank: Plan(dies=(1, "update", 3)) for rank in (0, 2)}) as crew:
        crew.replace(0, 2)
        assert crew.told("none") == [None] * 4


def test_two_that_are_no_pair_are_both_replaced() -> None:
    with Crew(FOUR, {rank: Plan(dies=(1, "update", 3)) for rank in (0, 1)}) as crew:
        crew.replace(0, 1)
        assert recovered(crew) == 2
        finished(crew)


def test_a_lost_node_with_two_ranks_is_replaced_as_a_whole() -> None:
    with Crew(["a", "a", "b", "b"], {rank: Plan(dies=(1, "update", 3)) for rank in (0, 1)}) as crew:
        crew.replace(0, 1)
        recovered(crew)
        finished(crew)


@pytest.mark.parametrize("nodes", [["a", "a"], ["a", "b", "c"]], ids="-".join)
def test_other_layouts(nodes: Sequence[str]) -> None:
    with Crew(nodes, {1: Plan(dies=(1, "confirm", 3))}) as crew:
        crew.replace(1)
        recovered(crew)
        finished(crew)


def test_copies_after_every_third_update() -> None:
    plan = Plan(every=3, steps=9)
    with Crew(FOUR, {1: Plan(every=3, steps=9, dies=(1, "update", 8))}, plan) as crew:
        crew.replace(1)
        assert recovered(crew) == 7  # after 1, 4 and 7
        finished(crew)


def test_with_one_version_a_loss_between_two_copies_costs_nothing() -> None:
    plan = Plan(versions=1, every=2, steps=8)
    with Crew(FOUR, {3: Plan(versions=1, every=2, steps=8, dies=(1, "update", 4))}, plan) as crew:
        crew.replace(3)
        assert crew.told("joined") == [3] * 4
        finished(crew)


# Steps 1 to 4 are made, and rank 1 is lost before the reduction of step 5. Its buddy is rank 3, whose ward it is.
@pytest.mark.parametrize(
    ("damages", "outcome"),
    [
        ({0: (("own", -1),)}, 3),
        ({3: (("wards", -1),)}, 3),
        ({0: (("own", -1),), 2: (("own", -2),)}, None),
        ({2: (("own", -1), ("own", -2))}, None),
        ({3: (("wards", -1), ("wards", -2))}, None),
        ({0: (("wards", -1), ("wards", -2))}, 4),
    ],
    ids=["own", "ward's", "different ones", "both own", "both of the ward", "both of a ward that lives"],
)
def test_a_damaged_version_is_not_used(damages: dict[int, tuple[tuple[str, int], ...]], outcome: int | None) -> None:
    plans = {rank: Plan(steps=5, damages=each) for rank, each in damages.items()} | {
        1: Plan(steps=5, dies=(1, "reduction", 5))
    }
    with Crew(FOUR, plans, Plan(steps=5)) as crew:
        crew.replace(1)
        if outcome is None:
            assert crew.told("none") == [None] * 4
        else:
            assert crew.told("joined") == [outcome] * 4
            finished(crew)


def test_a_copy_that_is_damaged_on_its_way_is_told_on_all_ranks_and_not_held() -> None:
    with Crew(FOUR, {1: Plan(spoils=(1, 11))}) as crew:
        lost = crew.told("lost")
        assert [name for name, _ in lost] == ["DamagedCopyError"] * 4
        assert crew.confirmed == 1
        assert lost[3][1] == ([1, 2], {1: [1]})
        assert lost[0][1] == ([1, 2], {2: [1, 2]})


def test_a_copy_of_another_generation_is_refused_before_anything_is_overwritten() -> None:
    with Crew(FOUR, {1: Plan(claims=7)}) as crew:
        (name, held), (other, _) = crew.told("lost", 3, 1)
        assert name == other == "RefusedCopyError"
        assert held == ([1], {1: []})


# A new rank receives its state: a head, five parts and the header.
@pytest.mark.parametrize(
    ("victim", "dies"),
    [
        (1, (2, "all_gather_object", 1)),
        (1, (2, "recv", 1)),
        (1, (2, "irecv", 5)),
        (1, (2, "recv", 2)),
        (1, (2, "all_reduce", 1)),
        (1, (2, "all_reduce", 2)),
    ],
    ids=lambda each: "-".join(map(str, each)) if isinstance(each, tuple) else str(each),
)
def test_a_new_rank_that_dies_while_it_gets_its_state_is_replaced_again(
    victim: int, dies: tuple[int, str, int]
) -> None:
    with Crew(FOUR, {1: Plan(dies=(1, "update", 3))}) as crew:
        crew.replace(1, plans={victim: Plan(dies=dies)})
        crew.replace(victim)
        steps = crew.told("joined")
        assert steps == [2] * 4
        finished(crew)


def test_a_second_survivor_that_dies_in_a_hand_over_is_replaced() -> None:
    # Rank 0 is neither the buddy of rank 1 nor its ward. In generation 2 it dies where copies are made anew.
    with Crew(FOUR, {1: Plan(dies=(1, "update", 3)), 0: Plan(dies=(2, "all_reduce", 1))}) as crew:
        crew.replace(1)
        crew.replace(0)
        assert crew.told("joined")[1:] == [2] * 3
        finished(crew)


def test_the_giver_that_dies_in_a_hand_over_takes_the_state_with_it() -> None:
    # A head and two parts of the state have left rank 3. So rank 1 lives, but it has never held a version.
    with Crew(FOUR, {1: Plan(dies=(1, "update", 3)), 3: Plan(dies=(2, "isend", 4))}) as crew:
        crew.replace(1)
        crew.replace(3)
        assert crew.told("none") == [None] * 4


def test_new_ranks_are_survivors_of_the_next_generation() -> None:
    with Crew(FOUR, {1: Plan(dies=(1, "update", 3))}) as crew:
        crew.replace(1, plans={1: Plan(steps=9)})
        crew.told("joined")
        for victim in (3, 1, 0):  # the giver, the one that got it, another one
            crew.kill(victim)
            crew.replace(victim)
            recovered(crew)
        finished(crew)


def test_versions_of_an_earlier_generation_never_mix_with_those_that_were_made_again() -> None:
    def held(*own: tuple[int, int], wards: dict[int, set[tuple[int, int]]] | None = None) -> Holding:
        return Holding(frozenset(own), {r: frozenset(keys) for r, keys in (wards or {}).items()}, fresh=not own)

    # Rank 0 still holds step 11 of generation 1. The others have made step 11 again.
    holdings = [held((1, 10), (1, 11)), held((1, 10), (2, 11)), held((1, 10), (2, 11))]
    assert common(holdings) == (1, 10)
    # What was made again is newer than any step that was dropped.
    holdings = [held((1, 12), (2, 11), wards={2: {(2, 11), (1, 12)}}), held((1, 12), (2, 11)), held()]
    assert common(holdings) == (2, 11)
    assert [(each.owner, each.source, each.target) for each in to_new((2, 11), holdings)] == [(2, 0, 2)]
    assert [(each.source, each.target) for each in to_buddies((2, 11), holdings, [1, 2, 0])] == [(0, 1), (1, 2)]
    assert common([held((1, 10)), held((1, 11))]) is None


def test_a_new_version_never_takes_the_place_of_the_confirmed_one() -> None:
    slots = Slots(2, size=8192)
    for step in (10, 11):
        slots.free().holds(step, 1, b"{}")
    # Step 10 is the common one after a loss, and step 11 is made again in generation 2.
    slots.free(safe=(1, 10)).holds(11, 2, b"{}")
    assert [version.key for version in slots.whole()] == [(1, 10), (2, 11)]
    slots.free(safe=(2, 11)).holds(12, 2, b"{}")
    assert [version.key for version in slots.whole()] == [(2, 11), (2, 12)]


def test_the_checksum_sees_a_wrong_bit_a_moved_row_and_another_header() -> None:
    state = torch.arange(3 * 8192, dtype=torch.int64).view(torch.uint8)
    told = checksum(state, b"{}")
    flipped, moved = state.clone(), state.clone()
    flipped[70_001] ^= 16
    moved[:8192], moved[8192:16384] = state[8192:16384], state[:8192]
    assert len({told, checksum(flipped, b"{}"), checksum(moved, b"{}"), checksum(state, b"[]")}) == 4


@pytest.mark.soak
def test_random_kills() -> None:
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    print("seed", seed)
    for _ in range(6):
        with Crew(FOUR, plan=Plan(steps=10**6)) as crew:
            crew.until_kept(2, *range(4))  # so that a version is confirmed
            for _ in range(8):
                time.sleep(draw.random() * 0.3)
                victims = draw.sample(range(4), draw.choice((1, 1, 1, 2)))
                crew.kill(*victims)
                crew.replace(*victims)
                if sorted(victims) in ([0, 2], [1, 3]):
                    assert crew.told("none") == [None] * 4
                    break
                recovered(crew)
