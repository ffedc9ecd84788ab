"""The rule behind a silent node: how long is silence, and whose fault is it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.health.silence import Silence

PATIENCE = 24.0


class Looks:
    """A watch that looks every two seconds at nodes n1 to n3."""

    def __init__(self, *held: str) -> None:
        self.silence = Silence(PATIENCE)
        self.held = set(held or ("n1", "n2", "n3"))
        self.now = 100.0
        self.peers: tuple[str, ...] = ()
        self.silence.look(self.now, self.held, self.held)

    def look(self, *heard: str, seconds: float = 2.0, times: int = 1, told: tuple[str, ...] = ()) -> set[str]:
        """The nodes that are lost after these looks."""
        for _ in range(times):
            self.now += seconds
            self.silence.look(self.now, heard, self.held, self.peers or self.held, told)
        return {name for name in self.held if self.silence.lost(name)}


def test_a_node_that_is_not_heard_for_longer_than_the_patience_is_lost():
    looks = Looks()
    assert looks.look("n1", "n2", times=12) == set()
    assert looks.look("n1", "n2") == {"n3"}
    assert looks.silence.seconds("n3") == 26.0
    assert looks.look("n1", "n2", "n3") == set()


def test_two_missed_heartbeats_are_enough_where_two_peers_have_lost_somebody():
    looks = Looks()
    assert looks.look("n1", "n2", times=2, told=("n1", "n2")) == set()
    assert looks.look("n1", "n2", told=("n1", "n2")) == {"n3"}
    assert looks.silence.told("n3")
    assert looks.look("n1", "n2") == set(), "what they said is withdrawn"


def test_neither_missed_heartbeats_nor_what_one_peer_says_is_enough():
    assert Looks().look("n1", "n2", times=8) == set()
    assert Looks().look("n1", "n2", times=8, told=("n1",)) == set()
    assert Looks().look("n1", "n2", times=8, told=("n1", "n3")) == set(), "a node that is not heard says nothing"
    assert Looks().look("n1", "n2", "n3", times=8, told=("n1", "n2")) == set()


def test_of_two_nodes_one_is_enough_to_tell_and_a_spare_is_not_meant():
    assert Looks("n1", "n2").look("n1", times=3, told=("n1",)) == {"n2"}
    looks = Looks()
    looks.peers = ("n1", "n2")
    assert looks.look("n1", times=3, told=("n1",)) == {"n2"}


def test_a_daemon_that_was_held_up_does_not_take_a_late_heartbeat_for_a_missed_one():
    looks = Looks()
    assert looks.look("n1", "n2", seconds=300.0, told=("n1", "n2")) == set()
    assert looks.look("n1", "n2", told=("n1", "n2")) == set()
    assert looks.look("n1", "n2", told=("n1", "n2")) == {"n3"}


def test_time_in_which_nobody_looked_counts_for_half_the_patience_at_most():
    looks = Looks()
    assert looks.look("n1", "n2", times=5) == set()
    assert looks.look("n1", "n2", seconds=500.0) == set(), "its heartbeat may come a moment later"
    assert not looks.silence.silent("n3")
    assert looks.look("n1", "n2", times=2) == {"n3"}
    assert looks.silence.seconds("n3") == 514.0, "as long as nobody has heard it, by the clock"


def test_a_daemon_that_is_always_slow_finds_a_silent_node_all_the_same():
    assert Looks().look("n1", "n2", seconds=60.0, times=3) == {"n3"}


def test_silence_of_all_nodes_is_believed_after_four_times_the_patience():
    looks = Looks()
    assert looks.look(times=47) == set()
    assert looks.look() == {"n1", "n2", "n3"}


def test_after_an_outage_each_node_has_its_patience_to_be_heard_again():
    looks = Looks()
    looks.look(times=20)
    assert looks.look("n1") == set()
    assert looks.look("n1", "n2", times=11) == set()
    assert looks.look("n1", "n2", times=2) == {"n3"}


def test_one_outage_after_the_other_does_not_hide_a_lost_node():
    looks = Looks()
    for _ in range(3):
        looks.look(times=12)
        lost = looks.look("n1", "n2")
    assert lost == {"n3"}


def test_a_node_that_is_only_just_held_says_nothing_about_the_others():
    looks = Looks()
    looks.look(times=14)
    looks.held.add("n4")
    assert looks.look() == set(), "nobody was heard"
    assert looks.look("n4") == set()
    assert looks.look("n4", times=13) == {"n1", "n2", "n3"}


def test_a_single_node_has_nobody_to_be_compared_with():
    assert Looks("n1").look(times=13) == {"n1"}


def test_a_node_that_is_held_again_is_listened_to_anew():
    looks = Looks()
    looks.look("n1", "n2", times=12)
    looks.held.remove("n3")
    looks.look("n1", "n2")
    assert looks.silence.heard_at("n3") is None
    looks.held.add("n3")
    assert looks.look("n1", "n2", times=13) == set()
    assert looks.look("n1", "n2") == {"n3"}


@st.composite
def late_readers(draw: st.DrawFn) -> tuple[list[tuple[float, float]], float]:
    """Looks of a daemon, each with its time and with how old the newest heartbeat is that can be read then; and when
    n1 dies. The daemon may be held up, and the file system may show nothing new for up to three times the patience."""
    looks: list[tuple[float, float]] = []
    now, stuck = 0.0, 0.0
    for _ in range(draw(st.integers(20, 120))):
        now += draw(st.sampled_from([0.5, 2.0, 2.0, 2.0, 5.0, 11.0, 60.0]))
        if now > stuck and draw(st.integers(0, 9)) == 0:
            began, stuck = now, now + draw(st.floats(0.0, 3.0 * PATIENCE))
            lag = draw(st.floats(0.0, 3.0))
        looks.append((now, (now - began) + lag if now <= stuck else draw(st.floats(0.0, 3.0))))
    return looks, draw(st.floats(0.0, now))


@given(late_readers(), st.integers(2, 5))
def test_when_one_node_dies_no_healthy_one_is_called_silent_however_late_it_is_read(
    world: tuple[list[tuple[float, float]], float], count: int
):
    looks, dies = world
    names = [f"n{number}" for number in range(1, count + 1)]
    silence, read = Silence(PATIENCE), dict.fromkeys(names, 0.0)
    silence.look(0.0, names, names)
    for now, age in looks:
        heard = []
        for number, name in enumerate(names):
            beats = min(now - age, dies) if name == "n1" else now - age
            newest = (beats - 0.3 * number) // 2.0 * 2.0 + 0.3 * number
            if newest > read[name]:
                read[name] = newest
                heard.append(name)
        silence.look(now, heard, names)
        assert {name for name in names if silence.lost(name)} <= {"n1"}
