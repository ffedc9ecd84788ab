"""Evaluation in whole runs, and against the same sum by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, Ranks, engine_of, settings, telemetry, train
from tests.trainer.test_train import arguments, reproducible
from trainer import recipes
from trainer.data.samples import Samples
from trainer.data.tokens import TokenFile
from trainer.evaluation import Evaluation
from trainer.parallel.engine import Engine
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import forward_backward, measure

EVERY = settings("steps=12", "checkpoint_every=4", "evaluate_every=5", "evaluate_sequences=7")


@pytest.fixture(scope="module")
def held_out(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    lines = text.read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "early.jsonl").write_text("".join(lines[:4]))
    (folder / "late.jsonl").write_text("".join(lines[-4:]))
    return folder / "early.jsonl", folder / "late.jsonl"


@pytest.fixture(scope="module")
def evaluated(text: Path, held_out: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    early, late = held_out
    valid = ["--valid", f"first={early}:3", "--valid", str(late)]
    done = train(2, *arguments(folder, text, "a1", *EVERY, *valid))
    assert [process.returncode for process in done] == [0, 0], done
    return folder


def test_each_corpus_has_its_interval_and_all_come_last(evaluated: Path) -> None:
    lines = telemetry(evaluated / "a1")
    told = {line["num_updates"]: set(line["valid"]) for line in lines if line["valid"]}
    first, both = {"first"}, {"first", "late"}
    assert told == {3: first, 5: {"late"}, 6: first, 9: first, 10: {"late"}, 12: both}
    late = [line["valid"]["late"] for line in lines if line["valid"] and "late" in line["valid"]]
    assert math.log(512) > late[0] > late[-1], "it learns nothing"
    for line in lines:
        assert (line["eval_seconds"] > 0) == (line["valid"] is not None)
    wall = sum(line["step_seconds"] + line["eval_seconds"] for line in lines)
    assert wall == pytest.approx(lines[-1]["train_wall"])


def test_the_phases_tell_of_it(evaluated: Path) -> None:
    phases = [json.loads(line) for line in (evaluated / "a1" / "phases.jsonl").read_text().splitlines()]
    told = [(line["phase"], line["step"]) for line in phases]
    evaluations = [step for phase, step in told if phase == "evaluation"]
    assert evaluations == [3, 5, 6, 9, 10, 12]
    assert told[told.index(("evaluation", 3)) + 1] == ("training", 3)
    assert told[-2:] == [("saving", 12), ("ending", 12)] or told[-3:-1] == [("evaluation", 12), ("saving", 12)]


def test_training_does_not_notice(evaluated: Path, text: Path, tmp_path: Path) -> None:
    done = train(2, *arguments(tmp_path, text, "a1", *EVERY))
    assert [process.returncode for process in done] == [0, 0], done
    plain = telemetry(tmp_path / "a1")
    assert reproducible(plain) == reproducible(telemetry(evaluated / "a1"))
    assert all(line["valid"] is None and line["eval_seconds"] == 0 for line in plain)
    path = manifest.step_folder(evaluated / "checkpoints", 8)
    done = train(2, *arguments(tmp_path, text, "a2", *EVERY, "--resume", path))
    assert "note: " not in done[0].stdout, "what is evaluated on decides nothing about the training"
    assert reproducible(telemetry(tmp_path / "a2")) == reproducible(plain)[8:]


def test_the_configuration_names_it(evaluated: Path, held_out: tuple[Path, Path]) -> None:
    data = json.loads((evaluated / "a1" / "config.json").read_text())["data"]
    assert [(corpus["name"], corpus["sources"]) for corpus in data["validation"]] == [
        ("first", [str(held_out[0])]),
        ("late", [str(held_out[1])]),
    ]


def file(name: str, tokens: int, every: int | None = None) -> TokenFile:
    ids = np.random.RandomState(len(name)).randint(4, 512, tokens).astype(np.uint16)
    return TokenFile(
        name=name,
        number=every,  # pyright: ignore[reportArgumentType]
        ids=ids,
        bounds=np.array([0, tokens // 3, tokens]),
        sources=[],
        digest="",
        tokenizer="",
        corrupt_lines=[],
    )


def recipe_of(dp: int, tp: int) -> recipes.Recipe:
    sizes = ["data.micro_batch=1", "evaluate_sequences=7", f"parallel.dp={dp}", f"parallel.tp={tp}"]
    return recipes.build("opt-tiny", [*SMALL, *sizes])


def measured(dp: int, tp: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Losses twice, with an update between, which the second must see; and the loss of the training batch."""
    recipe = recipe_of(dp, tp)
    engine: Engine = engine_of(recipe)
    evaluation = Evaluation(recipe, [file("short", 130), file("longer", 1000)], engine)
    before, _ = evaluation.run(["short", "longer"])
    samples = Samples(file("training", 3000).ids, recipe.data.seq_len, 1)
    update = measure(engine, forward_backward(engine, samples, recipe, Progress()), StepInputs())
    engine.update(update.gnorm, 1e-2, update.divisor)
    after, seconds = evaluation.run(["longer"])
    assert seconds > 0
    return before, after, update.loss


def by_hand() -> dict[str, float]:
    recipe = recipe_of(1, 1)
    model = engine_of(recipe).model
    losses = {}
    for name, tokens, count in (("short", 130, 4), ("longer", 1000, 7)):
        made = file(name, tokens)
        inputs, targets = Samples(made.ids, 32, 0, made.bounds).batch(0, count)
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        with torch.no_grad():
            logits, _ = model(inputs)
        losses[name] = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    return losses


def test_the_loss_is_that_by_hand_on_every_layout(ranks: Ranks) -> None:
    expected: dict[str, float] = ranks(1, by_hand)[0]
    results: list[Any] = []
    for dp, tp in ((1, 1), (2, 1), (1, 2), (3, 1)):
        results += ranks(dp * tp, measured, dp, tp)
    for before, after, training in results:
        assert before == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(results[0][1], rel=1e-4)
        assert training == pytest.approx(results[0][2], rel=1e-5)
        assert abs(after["longer"] - before["longer"]) > 1e-3, "the update is not seen"


def too_short() -> None:
    recipe = recipe_of(1, 1)
    Evaluation(recipe, [file("tiny", 20)], engine_of(recipe))


def test_a_corpus_without_a_sample_is_refused(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="--valid tiny: the data has 20 tokens, less than one sample of 33"):
        ranks(1, too_short)
