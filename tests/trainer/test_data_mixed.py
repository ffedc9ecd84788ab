"""Whole runs on several corpora."""

import json
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from tests.trainer.harness import SMALL, settings, telemetry, train
from tests.trainer.test_train import reproducible

EVERY = settings(*SMALL, "steps=10", "checkpoint_every=5")


@pytest.fixture(scope="module")
def corpora(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One of them with a corrupt line, and so short that it comes round several times."""
    lines = text.read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "short.jsonl").write_text("{torn\n" + "".join(lines[:1]))
    (folder / "long.jsonl").write_text("".join(lines[1:]))
    return ["--data", f"few={folder}/short.jsonl:0.25", "--data", f"many={folder}/long.jsonl:0.75"]


def arguments(folder: Path, corpora: list[str], *extra: str | Path) -> list[str | Path]:
    places = ["--run-dir", folder / "a1", "--checkpoint-dir", folder / "checkpoints"]
    return ["--recipe", "opt-tiny", *corpora, *places, *EVERY, *extra]


@pytest.fixture(scope="module")
def mixed(corpora: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    done = train(2, *arguments(folder, corpora))
    assert [process.returncode for process in done] == [0, 0], done
    told = [process.stderr for process in done if process.stderr]
    assert len(told) == 1, "one of them builds"
    assert "short.jsonl:1: not a JSON object" in told[0]
    return folder


def test_the_configuration_tells_shares_and_what_was_left_out(mixed: Path) -> None:
    data = json.loads((mixed / "a1" / "config.json").read_text())["data"]
    few, many = data["corpora"]
    assert (few["name"], few["share"], few["documents"], few["corrupt_lines"]) == ("few", 0.25, 1, 1)
    assert (many["name"], many["share"], many["corrupt_lines"]) == ("many", 0.75, 0)
    assert data["tokens"] == few["tokens"] + many["tokens"]
    assert [Path(source).name for source in data["sources"]] == ["short.jsonl", "long.jsonl"]


def test_resumed_it_is_the_same_training_to_the_last_bit(mixed: Path, corpora: list[str], tmp_path: Path) -> None:
    path = manifest.step_folder(mixed / "checkpoints", 5)
    done = train(2, *arguments(tmp_path, corpora, "--resume", path))
    assert [process.returncode for process in done] == [0, 0], done
    assert "note: " not in done[0].stdout
    assert reproducible(telemetry(tmp_path / "a1")) == reproducible(telemetry(mixed / "a1"))[5:]


def test_other_weights_are_other_data_and_fewer_ranks_are_not(mixed: Path, corpora: list[str], tmp_path: Path) -> None:
    (alone,) = train(0, *arguments(tmp_path, corpora))
    assert alone.returncode == 0, alone
    expected = [line["loss"] for line in telemetry(mixed / "a1")]
    assert [line["loss"] for line in telemetry(tmp_path / "a1")] == pytest.approx(expected, rel=1e-5)
    path = manifest.step_folder(mixed / "checkpoints", 5)
    others = [corpora[0], corpora[1].replace(":0.25", ":0.5"), *corpora[2:]]
    other = tmp_path / "other"
    (done,) = train(0, *arguments(other, others, "--resume", path, *settings("steps=6")))
    assert done.returncode == 0, done
    assert "note: settings, data" in done.stdout
