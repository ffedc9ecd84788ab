"""Data that changes while a run goes on: the order of samples, and whole runs to the last bit."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.contract import manifest
from opt_ops.contract.data_since import by_step, parse_data_since
from opt_ops.contract.skip_windows import next_sample
from tests.trainer.harness import SMALL, settings, telemetry, train
from tests.trainer.test_train import reproducible
from trainer.data.changes import first_samples
from trainer.data.mixture import turns
from trainer.data.samples import Mixture, Samples, Stretch
from trainer.errors import UserError

BATCH = 8
EVERY = settings(*SMALL, "steps=10", "checkpoint_every=2", "optim.peak_lr=3e-3")
WINDOW = ("--skip-batches", "7:8")


# ---- the order


def corpus(seed: int) -> Samples:
    return Samples(np.arange(100), 4, seed)


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, list[int], list[int]]]:
    found, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        corpora = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        found.append((first, corpora, draw(st.lists(st.integers(1, 5), min_size=len(corpora), max_size=len(corpora)))))
        first += draw(st.integers(1, 40))
    found[0] = (0, list(range(len(found[0][1]))), found[0][2])
    return found


@given(stretches(), st.integers(0, 60))
def test_each_corpus_goes_on_behind_its_samples_so_far(
    parts: list[tuple[int, list[int], list[int]]], more: int
) -> None:
    """Against counting them one by one."""
    (_, _, first), *later = parts
    mixture = Mixture([corpus(seed) for seed in range(4)], first, [Stretch(*each) for each in later])
    had: Counter[int] = Counter()
    ends = [each[0] for each in later] + [parts[-1][0] + more]
    for (begins, corpora, shares), end in zip(parts, ends, strict=True):
        order = turns(shares)
        for sample in range(begins, end):
            chosen = corpora[order[(sample - begins) % len(order)]]
            found, index = mixture.corpus_of(np.array([sample]))
            assert (int(found[0]), int(index[0])) == (chosen, had[chosen]), sample
            had[chosen] += 1
    whole = np.arange(ends[-1])
    together = mixture.corpus_of(whole)
    alone = [mixture.corpus_of(np.array([sample])) for sample in whole]
    assert [int(found[0]) for found, _ in alone] == together[0].tolist()
    assert [int(index[0]) for _, index in alone] == together[1].tolist()


WINDOWS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)).map(lambda w: (w[0], w[0] + w[1])), max_size=3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True).map(sorted), WINDOWS, st.integers(0, 40))
def test_a_change_begins_at_the_same_sample_wherever_training_resumes(
    changes: list[int], skips: list[tuple[int, int]], resumed: int
) -> None:
    from_scratch = first_samples(changes, 0, 0, BATCH, skips)
    position = 0
    for _ in range(resumed):
        position = next_sample(position, BATCH, skips) + BATCH
    recorded = [pair for pair in zip(changes, from_scratch, strict=True) if pair[0] <= resumed]
    assert first_samples(changes, resumed, position, BATCH, skips, recorded) == from_scratch
    assert from_scratch == sorted(set(from_scratch))


def test_a_checkpoint_behind_the_change_must_have_been_trained_with_it() -> None:
    assert first_samples([4], 4, 32, BATCH, []) == [32]
    with pytest.raises(UserError, match="step 6 was trained without that change"):
        first_samples([4], 6, 48, BATCH, [])


@pytest.mark.parametrize("text", ["", "5", "5:", "0:a", "-1:a", "x:a", "1.5:a", "²:a"])
def test_what_is_no_step_and_corpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected STEP"):
        parse_data_since(text)


def test_the_corpora_of_a_step_stay_together_in_their_order() -> None:
    texts = ["9:c=c:1", "5:b=/x:y:0.5", "9:a=a:2"]
    assert by_step(map(parse_data_since, texts)) == {5: ["b=/x:y:0.5"], 9: ["c=c:1", "a=a:2"]}


# ---- whole runs


@pytest.fixture(scope="module")
def corpora(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = text.read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("corpora")
    for number, name in enumerate(("wiki", "books", "code")):
        (folder / f"{name}.jsonl").write_text("".join(lines[number::3]))
    return folder


def old(folder: Path) -> list[str]:
    return ["--data", f"wiki={folder}/wiki.jsonl:0.5", "--data", f"books={folder}/books.jsonl:0.5"]


def both(folder: Path, step: int = 4) -> list[str]:
    new = [f"code={folder}/code.jsonl:0.25", f"wiki={folder}/wiki.jsonl:0.75"]
    return [*old(folder), *(word for each in new for word in ("--data-since", f"{step}:{each}"))]


def attempt(folder: Path, name: str, *words: str | Path) -> list[tuple[Any, ...]]:
    places = ["--run-dir", folder / name, "--checkpoint-dir", folder / name / "checkpoints"]
    (done,) = train(0, "--recipe", "opt-tiny", *places, *EVERY, *words)
    assert done.returncode == 0, done
    return reproducible(telemetry(folder / name))


def saved(folder: Path, name: str, step: int) -> list[str | Path]:
    return ["--resume", manifest.step_folder(folder / name / "checkpoints", step)]


@pytest.fixture(scope="module")
def runs(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained with the list of both from the beginning; and with the old data alone."""
    folder = tmp_path_factory.mktemp("runs")
    attempt(folder, "both", *both(corpora), *WINDOW)
    attempt(folder, "old", *old(corpora), *WINDOW)
    return folder


def lines(folder: Path, name: str) -> list[tuple[Any, ...]]:
    return reproducible(telemetry(folder / name))


def losses(found: Sequence[tuple[Any, ...]]) -> list[float]:
    return [line[1] for line in found]


def test_until_the_change_it_is_the_old_data_and_then_it_is_not(runs: Path) -> None:
    whole, before = lines(runs, "both"), lines(runs, "old")
    assert whole[:4] == before[:4]
    assert all(a != b for a, b in zip(losses(whole)[4:], losses(before)[4:], strict=True))
    assert [line[-1] for line in whole] == [line[-1] for line in before]


@pytest.mark.parametrize(
    ("of", "step"),
    [("old", 2), ("old", 4), ("both", 4), ("both", 6), ("both", 8)],
    ids=["list before", "the change itself", "restart at it", "behind it, before a gap", "behind both"],
)
def test_resumed_anywhere_it_is_the_training_with_the_list_of_both(
    runs: Path, corpora: Path, tmp_path: Path, of: str, step: int
) -> None:
    assert attempt(tmp_path, "a", *both(corpora), *WINDOW, *saved(runs, of, step)) == lines(runs, "both")[step:]


def test_rolled_back_to_before_the_change_it_is_the_old_training(runs: Path, corpora: Path, tmp_path: Path) -> None:
    assert attempt(tmp_path, "a", *old(corpora), *WINDOW, *saved(runs, "both", 2)) == lines(runs, "old")[2:]


def test_configuration_and_checkpoints_say_what_was_trained_on_since_when(runs: Path, corpora: Path) -> None:
    data = json.loads((runs / "both" / "config.json").read_text())["data"]
    first, second = data["since"]
    assert (first["step"], first["first_sample"], second["step"], second["first_sample"]) == (0, 0, 4, 4 * BATCH)
    assert [(each["name"], each["share"]) for each in second["corpora"]] == [("code", 0.25), ("wiki", 0.75)]
    assert data["digest"] == first["digest"] != second["digest"], "the attempt begins with the first"
    assert "since" not in json.loads((runs / "old" / "config.json").read_text())["data"]
    known = {step: manifest.read(path).data_since for step, path in manifest.committed(runs / "both" / "checkpoints")}
    assert [list(known[step]) for step in (2, 4, 8)] == [[], [[4, 32]], [[4, 32]]]


def test_data_that_a_checkpoint_was_not_trained_with_is_refused(runs: Path, corpora: Path, tmp_path: Path) -> None:
    words = ["--run-dir", tmp_path / "a", "--checkpoint-dir", tmp_path / "c", *EVERY, *both(corpora)]
    for extra in ([], ["--check"]):
        (done,) = train(0, "--recipe", "opt-tiny", *words, *saved(runs, "old", 6), *extra)
        assert done.returncode == 78, done
        assert "step 6 was trained without that change" in done.stderr
