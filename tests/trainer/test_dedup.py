"""Deduplication: what goes and what stays, against a comparison of all pairs; the same bytes however it is run."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from opt_ops.runfolder import fields, trainer_files
from trainer import recipes
from trainer.data import dataset
from trainer.data.dedup import run as runs
from trainer.data.dedup.run import run
from trainer.data.dedup.words import jaccard, run_set, words
from trainer.data.dedup.work import Options
from trainer.data.tokens import builder
from trainer.errors import UserError

pytest.importorskip("rensa")

WORDS = [f"w{number}" for number in range(2000)]


class Corpus:
    """Documents made from a seed, with the family that each belongs to."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.documents: list[tuple[str, str]] = []  # (family, text)

    def text(self, length: int) -> list[str]:
        return [self.random.choice(WORDS) for _ in range(length)]

    def families(self, number: int) -> Corpus:
        """Each a document, an exact copy in other letters, and copies with one and with many words changed."""
        for family in range(number):
            first = self.text(self.random.randint(120, 400))
            self._add(family, first)
            self._add(family, [word.upper() for word in first])
            self._add(family, self._changed(first, 1))
            self._add(f"{family} far", self._changed(first, len(first) // 6))
        self.random.shuffle(self.documents)
        return self

    def _add(self, family: Any, text: Sequence[str]) -> None:
        self.documents.append((str(family), " ".join(text)))

    def _changed(self, text: Sequence[str], number: int) -> list[str]:
        changed = list(text)
        for place in self.random.sample(range(len(changed)), number):
            changed[place] = f"x{self.random.randrange(10**6)}"
        return changed


def write(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def removed(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "removed.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def bytes_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads(found.pop("dedup.json"))
    del report["seconds"]
    return found | {"dedup.json": json.dumps(report).encode()}


def test_a_run_of_words_is_told_by_its_words_and_their_order():
    assert jaccard(run_set("a b c d e f"), run_set("A, b; C d e -- F!")) == 1.0
    assert jaccard(run_set("a b c d e f"), run_set("f e d c b a")) == 0.0
    assert jaccard(run_set("a b c d e f g"), run_set("a b c d e f h")) == pytest.approx(2 / 4)
    assert jaccard(run_set("a b"), run_set("a b")) == 1.0, "fewer than five words are one run"
    assert len(run_set("")) == 1
    assert len(words("naïve ÄPFEL_1 42")) == 3


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_what_goes_is_what_a_comparison_of_all_pairs_says(tmp_path: Path, seed: int):
    corpus = Corpus(seed).families(30)
    path = write(tmp_path / "a.jsonl", [text for _, text in corpus.documents])
    report = run(Options(inputs=(path,), out=tmp_path / "out"))
    kept: list[str] = []
    for _, text in corpus.documents:
        if not any(jaccard(run_set(text), run_set(other)) >= 0.95 for other in kept):
            kept.append(text)
    assert read(tmp_path / "out/a.jsonl") == kept, "the earlier one stays, in order"
    families = {family for family, _ in corpus.documents}
    texts = dict.fromkeys(read(tmp_path / "out/a.jsonl"))
    assert {family for family, text in corpus.documents if text in texts} == families, "each family keeps one"
    assert report["documents_in"] == report["documents_out"] + sum(report["removed"].values())
    near = [row for row in removed(tmp_path / "out") if row["why"] == "near"]
    assert near
    assert all(row["jaccard"] >= 0.95 for row in near)


def test_lines_stay_byte_for_byte(tmp_path: Path):
    lines = [
        b'{"meta": 1,  "text": "one two three"}\n',
        '{"text": "Gr\u00fc\u00dfe aus K\u00f6ln \U0001f600"}\n'.encode(),
        b"\n",
        b"nonsense\n",
        b'{"text":"ONE, two, three"}\n',
        b'{"text": "the last line has no end"}',
    ]
    path = tmp_path / "in/sub/a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(lines))
    report = run(Options(inputs=(tmp_path / "in",), out=tmp_path / "out"))
    assert (tmp_path / "out/sub/a.jsonl").read_bytes() == lines[0] + lines[1] + lines[5] + b"\n"
    assert report["removed"] == {"exact": 1, "near": 0, "contaminated": 0, "corrupt": 1}
    exact, corrupt = removed(tmp_path / "out")
    assert (exact["document"], exact["kept"]) == (f"{path}:5", f"{path}:1")
    assert (corrupt["document"], corrupt["why"]) == (f"{path}:4", "corrupt")


def test_texts_that_are_tested_on_go_and_short_common_runs_stay(tmp_path: Path):
    corpus = Corpus(5)
    tests = [corpus.text(60) for _ in range(6)] + [["short", "question"]]
    inside = [corpus.text(90) + test[:13] + corpus.text(90) for test in tests[:3]]
    seven = [corpus.text(90) + test[:12] + corpus.text(90) for test in tests[:3]]
    copies = [" ".join(tests[3]).upper(), "Short question?"]
    path = write(tmp_path / "a.jsonl", [*(" ".join(text) for text in [*inside, *seven]), *copies])
    against = write(tmp_path / "tests.jsonl", [" ".join(test) for test in tests])
    report = run(Options(inputs=(path,), out=tmp_path / "out", against=(against,)))
    assert read(tmp_path / "out/a.jsonl") == [" ".join(text) for text in seven]
    assert report["removed"]["contaminated"] == 5
    assert report["contaminated"] == {str(against): 5}
    assert {row["kept"] for row in removed(tmp_path / "out")} == {f"{against}:{line}" for line in (1, 2, 3, 4, 7)}


@pytest.mark.parametrize("lines", ["", '{"question": "why"}\n'], ids=["empty", "no text"])
def test_a_test_without_texts_is_refused(tmp_path: Path, lines: str):
    source = write(tmp_path / "in.jsonl", ["a text that stays"])
    (tmp_path / "tests.jsonl").write_text(lines)
    with pytest.raises(UserError, match="no line has a text"):
        run(Options(inputs=(source,), out=tmp_path / "out", against=(tmp_path / "tests.jsonl",)))
    assert not (tmp_path / "out").exists()


def test_copies_of_an_older_corpus_go_but_what_they_share_a_passage_with_stays(tmp_path: Path):
    corpus = Corpus(6)
    old = corpus.text(200)
    passage = corpus.text(100) + old[:60] + corpus.text(100)
    texts = [" ".join(old), " ".join([*old[:-1], "other"]), " ".join(passage)]
    path = write(tmp_path / "new.jsonl", texts)
    known = write(tmp_path / "old/a.jsonl", texts[:1])
    report = run(Options(inputs=(path,), out=tmp_path / "out", known=(known.parent,)))
    assert read(tmp_path / "out/new.jsonl") == texts[2:]
    assert [(row["why"], row["kept"]) for row in removed(tmp_path / "out")] == [
        ("exact", f"{known}:1"),
        ("near", f"{known}:1"),
    ]
    assert [each["path"] for each in report["against_duplicates"]] == [str(known)]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of two files in several pieces."""
    monkeypatch.setattr(builder, "PIECE", 50_000)
    texts = [text for _, text in Corpus(7).families(60).documents]
    write(tmp_path / "in/a.jsonl", texts[:100])
    write(tmp_path / "in/b.jsonl", texts[100:])
    run(Options(inputs=(tmp_path / "in",), out=tmp_path / "expected"))
    return tmp_path


_sketch_piece: Callable[..., None] = runs._sketch_piece


def killed_once(piece: Any, *others: Any) -> None:
    """The process that gets the second piece is killed, once."""
    marker = piece.sketches.parents[2] / "was killed"
    if piece.sketches.name.endswith("00001.npz") and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    _sketch_piece(piece, *others)


def test_several_processes_of_which_one_is_killed_give_the_same_bytes(large: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "_sketch_piece", killed_once)
    told: list[str] = []
    run(Options(inputs=(large / "in",), out=large / "out", workers=2), told.append)
    assert any("killed" in line for line in told)
    assert bytes_of(large / "out") == bytes_of(large / "expected")
    assert not (large / "out.part").exists()


def test_an_interrupted_run_goes_on_with_what_it_had(large: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    def interrupted(piece: Any, *others: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(piece.sketches.name)
        _sketch_piece(piece, *others)

    monkeypatch.setattr(runs, "_sketch_piece", interrupted)
    options = Options(inputs=(large / "in",), out=large / "out")
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert not (large / "out").exists()
    again: list[str] = []
    monkeypatch.setattr(
        runs, "_sketch_piece", lambda *given: (again.append(given[0].sketches.name), _sketch_piece(*given))
    )
    run(options)
    assert again
    assert not set(again) & set(done)
    assert bytes_of(large / "out") == bytes_of(large / "expected")


def test_config_json_and_the_supervisor_know_what_was_removed(large: Path):
    recipe = recipes.opt_tiny()
    about = dataset.load([str(large / "expected")], [], None, recipe).about()
    (dedup,) = about["dedup"]
    report = json.loads((large / "expected/dedup.json").read_text())
    assert dedup == {"source": str(large / "expected"), **{key: report[key] for key in report if key != "seconds"}}
    known = trainer_files._deduplicated(fields.Record(dedup, ""))
    assert (known.documents_out, known.removed) == (report["documents_out"], report["removed"])


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path):
    def command(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "trainer.data.dedup", *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    write(tmp_path / "a.jsonl", ["one text", "another text"])
    assert command("a.jsonl", "--out", "clean", "--workers", "1")[0] == 0
    assert json.loads((tmp_path / "clean/dedup.json").read_text())["documents_out"] == 2
    code, said = command("a.jsonl", "--out", "clean")
    assert (code, "exists already" in said) == (78, True), said
    (tmp_path / "link").symlink_to("nowhere")
    code, said = command("a.jsonl", "--out", "link")
    assert (code, "exists already" in said) == (78, True), said
    assert command("a.jsonl", "--out", "other", "--threshold", "2")[0] == 78
    assert command("missing.jsonl", "--out", "other")[0] == 78
    (tmp_path / "taken.part").write_text("a file of somebody")
    code, said = command("a.jsonl", "--out", "taken")
    assert (code, "taken.part cannot be made" in said) == (78, True), said
    write(tmp_path / "in/a.jsonl", ["x"])
    with pytest.raises(UserError, match="would both become"):
        run(Options(inputs=(tmp_path / "a.jsonl", tmp_path / "in"), out=tmp_path / "other"))
