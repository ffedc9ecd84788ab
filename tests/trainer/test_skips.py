"""Runs that leave batches out, against training on what remains, batch by batch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_train import arguments, reproducible
from trainer import optim, recipes
from trainer.data import dataset
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import forward_backward, measure

BATCH = 8
WINDOWS = ("--skip-batches", "6:7", "--skip-batches", "4:6")
TRAINED_ON = (1, 2, 3, *range(8, 17))
EVERY = settings("steps=12", "checkpoint_every=3")


@pytest.fixture(scope="module")
def skipping(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipping")
    done = train(2, *arguments(folder, text, "a1", *EVERY, *WINDOWS))
    assert [process.returncode for process in done] == [0, 0], done
    return folder


def batches(lines: list[dict[str, Any]]) -> list[int]:
    return [line["data_position"] // BATCH for line in lines]


def by_hand(text: Path, numbers: Sequence[int]) -> list[float]:
    """The losses of one update on each of the batches ``numbers``."""
    recipe = recipes.build("opt-tiny", [*SMALL, "optim.peak_lr=3e-3"])
    engine = engine_of(recipe)
    samples = dataset.load([str(text)], [], None, recipe).samples(recipe.data.seq_len, recipe.seed)
    losses = []
    for step, number in enumerate(numbers, start=1):
        before = Progress(step=step - 1, data_position=(number - 1) * BATCH)
        measured = measure(engine, forward_backward(engine, samples, recipe, before), StepInputs())
        engine.update(measured.gnorm, optim.learning_rate(step, recipe.optim), measured.divisor)
        losses.append(measured.loss)
    return losses


def test_the_losses_are_those_of_training_on_the_remaining_batches(ranks: Ranks, text: Path, skipping: Path) -> None:
    lines = telemetry(skipping / "a1")
    assert batches(lines) == list(TRAINED_ON)
    losses = [line["loss"] for line in lines]
    assert losses == pytest.approx(ranks(2, by_hand, text, TRAINED_ON)[0], rel=1e-9)
    assert [line["tokens"] for line in lines] == [step * BATCH * 32 for step in range(1, 13)]


def test_configuration_and_checkpoints_name_what_was_left_out(skipping: Path) -> None:
    config = json.loads((skipping / "a1" / "config.json").read_text())
    assert config["skips"] == [[6, 7], [4, 6]]
    positions = {}
    for step, path in manifest.committed(skipping / "checkpoints"):
        found = manifest.verify(path)
        assert found.skips == [[6, 7], [4, 6]]
        positions[step] = found.data_position // BATCH
    assert positions == {3: 3, 6: 10, 9: 13, 12: 16}


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_before_or_behind_the_windows_it_is_the_same_training(
    text: Path, skipping: Path, tmp_path: Path, step: int
) -> None:
    path = manifest.step_folder(skipping / "checkpoints", step)
    done = train(2, *arguments(tmp_path, text, "a2", *EVERY, *WINDOWS, "--resume", path))
    assert [process.returncode for process in done] == [0, 0], done
    assert "note: " not in done[0].stdout, "other settings than those of the checkpoint"
    assert reproducible(telemetry(tmp_path / "a2")) == reproducible(telemetry(skipping / "a1"))[step:]


def test_rolled_back_with_one_window_more_it_goes_on_behind_that(text: Path, skipping: Path, tmp_path: Path) -> None:
    path = manifest.step_folder(skipping / "checkpoints", 6)
    windows = [*WINDOWS, "--skip-batches", "11:13", "--skip-batches", "2:2"]  # that of the second is past and void
    done = train(2, *arguments(tmp_path, text, "a2", *EVERY, *windows, "--resume", path))
    assert [process.returncode for process in done] == [0, 0], done
    assert "note: settings, data, learning-rate factors or skip windows differ" in done[0].stdout
    assert batches(telemetry(tmp_path / "a2")) == [*range(14, 20)]
