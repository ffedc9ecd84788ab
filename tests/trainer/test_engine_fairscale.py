"""The second engine computes what the first one does, goes on from its own checkpoints, and from the other's."""

from pathlib import Path

import pytest

from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_parallel import build, samples
from trainer import manifest, optim
from trainer.checkpoint import Checkpointer
from trainer.fence import Fence
from trainer.outside import Heard
from trainer.step import advanced, forward_backward, measure
from trainer.telemetry import Progress

pytest.importorskip("fairscale", reason="needs fairscale (opt-ops[fairscale])")

SAVED, STEPS = 5, 25


def losses(engine: str, dp: int, tp: int, save: Path | None = None, load: Path | None = None) -> list[float]:
    """Of the steps up to the last, with a checkpoint after SAVED of them, or from one on."""
    recipe = build(dp, tp, f"engine={engine}")
    running = engine_of(recipe)
    data, progress, found = samples(recipe), Progress(), []
    folder = save or load
    checkpointer = Checkpointer(folder, running.state(), Fence(None, "1.00-a1")) if folder else None
    if checkpointer and load:
        at = checkpointer.load(manifest.step_folder(load, SAVED))
        progress = Progress(step=at.step, data_position=at.data_position, tokens=at.tokens)
    while progress.step < STEPS:
        measured = measure(running, forward_backward(running, data, recipe, progress), Heard())
        running.update(measured.gnorm, optim.learning_rate(progress.step + 1, recipe.optim))
        progress = advanced(progress, recipe)
        found.append(measured.loss)
        if checkpointer and save and progress.step == SAVED:
            checkpointer.save(
                {
                    "step": SAVED,
                    "attempt": "1.00-a1",
                    "ts": 0.0,
                    "layout": {},
                    "data_position": progress.data_position,
                    "tokens": progress.tokens,
                    "settings_digest": "sha256:0",
                    "telemetry": {},
                }
            )
            assert checkpointer.wait()
    return found


@pytest.fixture(scope="module")
def first_engine(ranks: Ranks) -> list[float]:
    return ranks(1, losses, "fsdp2", 1, 1)[0]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_both_engines_have_the_same_losses(ranks: Ranks, first_engine: list[float], dp: int, tp: int) -> None:
    for rank in ranks(dp * tp, losses, "fairscale", dp, tp):
        assert rank == pytest.approx(first_engine, rel=1e-5)


def test_it_goes_on_from_its_own_checkpoint_to_the_last_bit(ranks: Ranks, tmp_path: Path) -> None:
    whole = ranks(4, losses, "fairscale", 2, 2, tmp_path)
    assert ranks(4, losses, "fairscale", 2, 2, None, tmp_path) == [rank[SAVED:] for rank in whole]


@pytest.mark.parametrize(("source", "target"), [("fairscale", "fsdp2"), ("fsdp2", "fairscale")])
def test_either_engine_goes_on_from_the_others_checkpoint_in_another_layout(
    ranks: Ranks, tmp_path: Path, first_engine: list[float], source: str, target: str
) -> None:
    ranks(4, losses, source, 2, 2, tmp_path)
    for dp, tp in ((1, 2), (3, 1)):
        for rank in ranks(dp * tp, losses, target, dp, tp, None, tmp_path):
            assert len(rank) == 20
            assert rank == pytest.approx(first_engine[SAVED:], rel=1e-5)


def test_whole_runs_use_it(text: Path, tmp_path: Path) -> None:
    arguments = [
        *("--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "c"),
        *settings(*SMALL, "steps=12", "checkpoint_every=6", "engine=fairscale", "checksum_every=4"),
    ]
    done = train(2, *arguments)
    assert [process.returncode for process in done] == [0, 0], done
    assert [process.stderr for process in done] == ["", ""]
    lines = telemetry(tmp_path / "a1")
    assert lines[-1]["lr"] == pytest.approx(12 / 60 * 1e-3), "read back from the optimizer inside"
    assert [step for step, _ in manifest.committed(tmp_path / "c")] == [6, 12]


@pytest.mark.parametrize("setting", ["precision=fp16", "parallel.offload=true", "compile=true"])
def test_what_it_does_not_do_is_refused(text: Path, tmp_path: Path, setting: str) -> None:
    arguments = ["--recipe", "opt-tiny", "--data", text, "--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path]
    (done,) = train(0, *arguments, *settings(*SMALL, "engine=fairscale", setting))
    assert done.returncode == 78
    assert "engine=fairscale does not do" in done.stderr
