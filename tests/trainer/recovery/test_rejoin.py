"""Ranks are lost, and the attempt goes on in place."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.membership import joining
from tests.trainer.harness import telemetry
from tests.trainer.recovery.attempt import Attempt

STEPS = 24


@pytest.fixture(scope="module")
def twin(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """An attempt that nothing happens to."""
    attempt = Attempt(tmp_path_factory.mktemp("twin"), text, f"steps={STEPS}", standbys=0)
    attempt.finish()
    return attempt


@pytest.fixture
def begin(text: Path, tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    """Starts an attempt with some standbys."""
    begun: list[Attempt] = []

    def attempt(standbys: int, *pairs: str) -> Attempt:
        begun.append(Attempt(tmp_path / f"{len(begun)}", text, f"steps={STEPS}", *pairs, standbys=standbys))
        return begun[-1]

    yield attempt
    for each in begun:
        each.close()


NAMES = ("loss", "gnorm", "actv_norm", "lr", "tokens", "data_position", "valid", "clip", "skipped")


def require_same(attempt: Attempt, twin: Attempt, *replaced: int) -> None:
    """Nothing shows that ranks were replaced, and no other process was."""
    ours, theirs = telemetry(attempt.run_dir), telemetry(twin.run_dir)
    assert [line["num_updates"] for line in ours] == list(range(1, STEPS + 1))
    for mine, its in zip(ours, theirs, strict=True):
        assert [mine[name] for name in NAMES] == [its[name] for name in NAMES], mine["num_updates"]
    for rank, (first, last) in enumerate(zip(attempt.launched, attempt.members, strict=True)):
        assert (first is last) == (rank not in replaced)
    assert [entry["generation"] for entry in attempt.joined][-1] == attempt.generation
    assert {joining(attempt.file_of(each)) for each in attempt.members} == {attempt.generation}
    assert all(entry["repeated"] == 0 for entry in attempt.joined)
    assert weights(attempt.checkpoints) == weights(twin.checkpoints)


def weights(checkpoints: Path) -> dict[str, bytes]:
    """The state in the last checkpoint."""
    step, path = manifest.committed(checkpoints)[-1]
    assert step == STEPS
    manifest.verify(path)
    return {file.name: file.read_bytes() for file in path.rglob("*.distcp")}


# That ranks lose their groups in any collective of a forward or backward pass is tested in test_rebuild.py.
@pytest.mark.parametrize(
    "places",
    [
        ("measure", "update", "copy"),
        pytest.param(("forward", "backward", "measure", "update", "copy"), marks=pytest.mark.soak),
    ],
    ids=["some", "all"],
)
def test_ranks_are_killed_at_every_place_of_a_step(
    begin: Callable[..., Attempt], twin: Attempt, places: tuple[str, ...]
) -> None:
    """Rank 0 comes last: its replacement takes older drills for done."""
    *kills, (_, _, last) = [(2 - n % 2, place, 3 * n + 1) for n, place in enumerate((*places, "confirm", ""), start=1)]
    attempt = begin(len(kills) + 1)
    attempt.drill(*kills, (0, "backward", last))
    attempt.keep_alive()
    require_same(attempt, twin, 0, 1, 2)
    assert attempt.generation == len(kills) + 2
    *steps, confirm, joined_last = [entry["step"] for entry in attempt.joined]
    assert steps == [step - 1 for _, _, step in kills[:-1]], "a step whose copies are not all sent is made again"
    assert joined_last == last - 1
    sent = kills[-1][2]
    assert confirm in (sent - 1, sent), "the copies were sent, so all may have them although nobody has confirmed it"


def test_a_rank_and_its_replacement_are_lost(begin: Callable[..., Attempt], twin: Attempt) -> None:
    attempt = begin(3)
    attempt.wait_for_step(5)
    attempt.kill(0)
    attempt.replace({0: attempt.standbys[0]})
    attempt.kill(0)  # at any moment of its start
    attempt.replace({0: attempt.standbys[0]})
    attempt.wait_for_join()
    attempt.kill(2)  # a rank that has kept its process until then
    attempt.replace({2: attempt.standbys[0]})
    attempt.finish()
    require_same(attempt, twin, 0, 2)


def test_a_rank_that_stands_still_is_replaced_and_writes_nothing_more(
    begin: Callable[..., Attempt], twin: Attempt
) -> None:
    attempt = begin(1)
    attempt.wait_for_step(5)
    old = attempt.members[0]
    old.send_signal(signal.SIGSTOP)
    attempt.replace({0: attempt.standbys[0]})
    attempt.wait_for_join()
    old.send_signal(signal.SIGCONT)
    assert old.wait(60) == 83
    attempt.finish()
    require_same(attempt, twin, 0)


def test_a_rank_is_lost_while_the_last_checkpoint_is_written(begin: Callable[..., Attempt], twin: Attempt) -> None:
    attempt = begin(1)
    attempt.wait_for_step(STEPS)
    attempt.members[1].kill()
    attempt.members[1].wait(60)
    if attempt.members[1].poll() != 0:
        attempt.replace_dead()
    attempt.finish()
    require_same(attempt, twin, *([1] if attempt.generation > 1 else []))


def test_lines_before_a_checkpoint_are_there_also_where_copies_are_rare(begin: Callable[..., Attempt]) -> None:
    """Training may be restarted from it, and then nobody makes those steps again."""
    attempt = begin(0, "steps=100000", "peer_copies.every=90000", "checkpoint_every=5")
    attempt.wait_for_step(10)


def test_a_rank_with_other_settings_joins_nothing(begin: Callable[..., Attempt]) -> None:
    """The orders can have newer ones than the ranks that run. Here the new rank would take other steps closely."""
    attempt = begin(0)
    attempt.standbys = [attempt.waiting("log_every=3")]
    attempt.wait_for_step(5)
    attempt.kill(1)
    attempt.replace({1: attempt.standbys[0]})
    assert [each.wait(120) for each in attempt.members] == [ExitCode.NO_COMMON_STEP] * 3
    assert "other settings or other code" in attempt.said()


def test_without_a_common_step_all_ranks_leave(begin: Callable[..., Attempt]) -> None:
    """A rank and its buddy are lost. What is on disk is whole."""
    attempt = begin(2)
    attempt.wait_for_step(5)
    lost = (1, 2)
    for rank in lost:
        attempt.members[rank].kill()
    for rank in lost:
        attempt.members[rank].wait(60)
    attempt.replace({1: attempt.standbys[0], 2: attempt.standbys[1]})
    assert {process.wait(120) for process in attempt.members} == {88}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_random_losses(begin: Callable[..., Attempt], twin: Attempt, seed: int) -> None:
    draw, attempt = random.Random(seed), begin(8)
    attempt.wait_for_step(1)  # before it, the supervisor restarts all ranks
    for _ in range(8):
        attempt.wait_for_step(attempt.step + draw.randrange(3))
        time.sleep(draw.random() * 0.1)
        victim = draw.choice(attempt.members)
        if victim.poll() is None:
            victim.kill()
            victim.wait(60)
        attempt.replace_dead()
        if attempt.generation > 1:  # a second loss before that could be that of a buddy
            attempt.wait_for_join()
    attempt.keep_alive()
    ranks = [rank for rank in range(3) if attempt.members[rank] is not attempt.launched[rank]]
    require_same(attempt, twin, *ranks)
