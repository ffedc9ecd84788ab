"""The second engine computes what the first one does, goes on from its own checkpoints, and from the other's."""

from pathlib import Path

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, Ranks, settings, telemetry, train
from tests.trainer.test_checkpoint import Training

pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")

SAVED, STEPS = 3, 8


def losses(engine: str, dp: int, tp: int, folder: Path, *, save: bool = False, load: bool = False) -> list[float]:
    """Of the steps up to the last, with a checkpoint after SAVED of them, or from one on."""
    training = Training(folder, dp, tp, f"engine={engine}")
    if load:
        training.load(manifest.step_folder(folder, SAVED))
    found = []
    while training.progress.step < STEPS:
        found.append(training.step())
        if save and training.progress.step == SAVED:
            training.save()
            assert training.checkpointer.wait()
    return found


def saving(engine: str, dp: int, tp: int, folder: Path) -> list[float]:
    return losses(engine, dp, tp, folder, save=True)


def loading(engine: str, dp: int, tp: int, folder: Path) -> list[float]:
    return losses(engine, dp, tp, folder, load=True)


@pytest.fixture(scope="module")
def first_engine(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return ranks(1, losses, "fsdp2", 1, 1, tmp_path_factory.mktemp("fsdp2"))[0]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_both_engines_have_the_same_losses(
    ranks: Ranks, tmp_path: Path, first_engine: list[float], dp: int, tp: int
) -> None:
    for rank in ranks(dp * tp, losses, "fairscale", dp, tp, tmp_path):
        assert rank == pytest.approx(first_engine, rel=1e-5)


def test_it_goes_on_from_its_own_checkpoint_to_the_last_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks(4, saving, "fairscale", 2, 2, tmp_path)
    assert ranks(4, loading, "fairscale", 2, 2, tmp_path) == [rank[SAVED:] for rank in whole]


@pytest.mark.parametrize(
    ("source", "target", "dp", "tp"),
    [
        ("fairscale", "fsdp2", 3, 1),
        ("fsdp2", "fairscale", 1, 2),
        pytest.param("fairscale", "fsdp2", 1, 2, marks=pytest.mark.soak),
        pytest.param("fsdp2", "fairscale", 3, 1, marks=pytest.mark.soak),
    ],
)
def test_either_engine_goes_on_from_the_others_checkpoint_in_another_layout(
    ranks: Ranks, tmp_path: Path, first_engine: list[float], source: str, target: str, dp: int, tp: int
) -> None:
    ranks(4, saving, source, 2, 2, tmp_path)
    for rank in ranks(dp * tp, loading, target, dp, tp, tmp_path):
        assert len(rank) == STEPS - SAVED
        assert rank == pytest.approx(first_engine[SAVED:], rel=1e-5)


def test_whole_runs_use_it(text: Path, tmp_path: Path) -> None:
    arguments = [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c"),
        *settings(*SMALL, "steps=6", "checkpoint_every=3", "engine=fairscale", "checksum_every=4"),
    ]
    done = train(2, *arguments)
    assert [process.returncode for process in done] == [0, 0], done
    assert [process.stderr for process in done] == ["", ""]
    lines = telemetry(tmp_path / "a1")
    assert lines[-1]["lr"] == pytest.approx(6 / 60 * 1e-3), "read back from the optimizer inside"
    assert [step for step, _ in manifest.committed(tmp_path / "c")] == [3, 6]


@pytest.mark.parametrize(
    ("setting", "why", "instead"),
    [
        ("precision=fp16", "on CPU: its FSDP needs a GPU", "precision=fp32"),
        (
            "parallel.offload=true",
            "keeps parameters and optimizer in the memory",
            "parallel.offload=false",
        ),
        ("compile=true", "its hooks move the memory of parameters", "compile=auto"),
    ],
)
def test_what_it_does_not_do_is_refused(text: Path, tmp_path: Path, setting: str, why: str, instead: str) -> None:
    arguments = ["--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path]
    (done,) = train(0, *arguments, *settings(*SMALL, "engine=fairscale", setting))
    assert done.returncode == 78
    assert f"engine=fairscale does not support {setting}" in done.stderr
    assert why in done.stderr
    assert f"Use engine=fsdp2, or set {instead}" in done.stderr
