"""Ranks are lost, and the attempt goes on in place."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import telemetry
from tests.trainer.recovery.attempt import Attempt

STEPS = 40


@pytest.fixture(scope="module")
def twin(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """An attempt that nothing happens to."""
    attempt = Attempt(tmp_path_factory.mktemp("twin"), text, f"steps={STEPS}", standbys=0)
    attempt.finish()
    return attempt


@pytest.fixture
def attempt(text: Path, tmp_path: Path) -> Iterator[Attempt]:
    attempt = Attempt(tmp_path, text, f"steps={STEPS}")
    yield attempt
    attempt.close()


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
    assert all(entry["repeated"] == 0 for entry in attempt.joined)
    assert weights(attempt.checkpoints) == weights(twin.checkpoints)


def weights(checkpoints: Path) -> dict[str, bytes]:
    """The state in the last checkpoint."""
    step, path = manifest.committed(checkpoints)[-1]
    assert step == STEPS
    manifest.verify(path)
    return {file.name: file.read_bytes() for file in path.rglob("*.distcp")}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_killed_at_any_moment(attempt: Attempt, twin: Attempt, rank: int) -> None:
    attempt.wait_for_step(5)
    attempt.kill(rank)
    attempt.replace({rank: attempt.standbys[0]})
    attempt.finish()
    require_same(attempt, twin, rank)
