"""`opt-ops data show`: which documents a step had, against a real run of the trainer with one odd document in it."""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opt_ops.cli.data import one_line
from opt_ops.core import events as e
from opt_ops.core.values import Checkpoint, Shape, Skip
from tests.core.story import Story
from tests.trainer.harness import SMALL, settings, telemetry, train

SEQ_LEN, BATCH, STEPS = 32, 8, 60
WINDOW = Skip(first=33, last=36)
ODD_LINE = 24  # of books.jsonl
CONTROL = "\x1b[31m\x07"


def written(folder: Path) -> tuple[Path, Path]:
    """Two corpora of easy sentences; one document of books is noise, with control characters at its beginning."""
    draw = random.Random(3)
    sentences = ["the cat sat on the mat and looked at the dog", "a bird sang in the tree while the sun went down"]
    wiki = [" ".join(draw.choices(sentences, k=4)) + "\n" for _ in range(120)]
    books = [" ".join(draw.choices(sentences, k=3)) for _ in range(40)]
    books[ODD_LINE - 3] = CONTROL + "".join(draw.choices("qxzjkvw0123456789#%&", k=50))
    lines = [json.dumps({"text": text}) + "\n" for text in books]
    lines.insert(2, "\n")  # an empty line and a corrupt one: they count as lines, but are no documents
    lines.insert(5, "{\n")
    (folder / "wiki").mkdir()
    (folder / "wiki" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wiki[:50]))
    (folder / "wiki" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in wiki[50:]))
    (folder / "books.jsonl").write_text("".join(lines))
    return folder / "wiki", folder / "books.jsonl"


class Site:
    """A folder with lineage 1: `1.00-a1` trained 60 steps; `1.01-a1` began again at step 30 without 4 batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wiki, self.books = written(folder)
        self.data = [f"wiki={self.wiki}:3", f"books={self.books}:1"]
        self.cache = {"OPT_OPS_CACHE": str(folder / "cache")}
        self.lineage = folder / "runs" / "1"
        (folder / "opt-ops.toml").write_text(f"[trainer]\ncommand = ['{sys.executable}', '-m', 'trainer']\n")

    def train(self, attempt: str, *more: str | Path) -> None:
        run = attempt.partition("/")[0]
        done = train(
            0,
            *("--recipe", "opt-tiny", *(word for each in self.data for word in ("--data", each))),
            *("--run-dir", self.lineage / attempt, "--checkpoint-dir", self.lineage / run / "checkpoints"),
            *settings(*SMALL, f"data.global_batch={BATCH}", "model.dropout=0", "optim.peak_lr=1e-2"),
            *settings("optim.warmup_steps=5", f"steps={STEPS}", "checkpoint_every=10", "guard.deviations=0"),
            *more,
            **self.cache,
        )
        assert [process.returncode for process in done] == [0], done

    def journal(self) -> None:
        story = Story()
        story.now = 0.0
        story.write(e.DaemonStarted(host="head", pid=1, version="0", policy="p", blind_seconds=None))
        story.write(
            e.LineageStarted(
                request="r0",
                author="ann",
                lineage="1",
                recipe="opt-tiny",
                settings=(),
                data=tuple(self.data),
                shape=Shape(nodes=1, spares=0, ranks_per_node=1),
            )
        )
        self._run(story, "1.00", None)
        self._run(story, "1.01", self._checkpoint("1.00", 30))
        story.save(self.lineage)

    def _run(self, story: Story, run: str, start: Checkpoint | None) -> None:
        story.write(
            e.RunPlanned(
                run=run,
                parent=start.run if start else None,
                cause="test",
                incident=None,
                checkpoint=start,
                lr_factors=(),
                skips=(WINDOW,) if start else (),
            )
        )
        attempt = f"{run}-a1"
        story.write(
            e.AttemptIntended(
                attempt=attempt, run=run, nodes=("n1",), ranks_per_node=1, checkpoint=start, incident=None
            )
        )
        for step in range((start.step if start else 0) + 10, STEPS + 1, 10):
            seen = self._checkpoint(run, step)
            story.write(e.CheckpointSeen(checkpoint=seen))
            if step < STEPS or start is None:  # the last one of the second run is not examined yet
                story.write(e.CheckpointVerified(checkpoint=seen, healthy=True, why=""))

    def _checkpoint(self, run: str, step: int) -> Checkpoint:
        return Checkpoint(run=run, step=step, path=str(self.lineage / run / "checkpoints" / f"step-{step:08d}"))

    def asked(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "opt_ops", "data", "show", *words],
            cwd=self.folder,
            env={**os.environ, **self.cache},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def documents(self, *words: str) -> list[dict[str, Any]]:
        """What the trainer answers."""
        config = self.lineage / "1.00" / "a1" / "config.json"
        data = [word for each in self.data for word in ("--data", each)]
        done = subprocess.run(
            [sys.executable, "-m", "trainer.documents", str(config), *words, *data],
            env={**os.environ, **self.cache},
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def items(self, *words: str) -> list[dict[str, Any]]:
        done = self.asked(*words, "-o", "json")
        assert done.returncode == 0, done.stderr
        shown = json.loads(done.stdout)
        assert shown["schema"] == "opt-ops/data-show/1"
        return shown["items"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("documents"))
    site.train("1.00/a1")
    start = site.lineage / "1.00" / "checkpoints" / "step-00000030"
    site.train("1.01/a1", "--resume", start, "--skip-batches", f"{WINDOW.first}:{WINDOW.last}")
    site.journal()
    return site


@pytest.fixture(scope="module")
def listed(site: Site) -> dict[int, list[dict[str, Any]]]:
    """By step of the first attempt, from one question for all of them: the trainer is asked as the command asks it."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in site.documents("--first", "0", "--count", str(STEPS * BATCH)):
        steps.setdefault(row["sample"] // BATCH + 1, []).append(row)
    return steps


def by_sample(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    samples: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        samples.setdefault(row["sample"], []).append(row)
    return samples


def is_odd(site: Site, row: dict[str, Any]) -> bool:
    return (row["source"], row["line"]) == (str(site.books), ODD_LINE)


def odd_steps(site: Site, listed: dict[int, list[dict[str, Any]]], least: int = 25) -> list[int]:
    """The steps with at least `least` tokens of the odd document, after the model has learned what is easy."""
    tokens = {step: sum(row["tokens"] for row in rows if is_odd(site, row)) for step, rows in listed.items()}
    return [step for step, many in tokens.items() if many >= least and 30 < step < STEPS]


def test_the_tokens_of_every_sample_add_up(listed: dict[int, list[dict[str, Any]]]):
    for rows in listed.values():
        tokens = [sum(row["tokens"] for row in sample) for sample in by_sample(rows).values()]
        assert tokens == [SEQ_LEN + 1] * BATCH  # the inputs, and the last token to predict


def test_each_corpus_has_its_share_and_each_place_is_the_line_of_the_document(
    site: Site, listed: dict[int, list[dict[str, Any]]]
):
    samples = {(row["sample"], row["corpus"]) for rows in listed.values() for row in rows}
    shares = [sum(corpus == name for _, corpus in samples) for name in ("wiki", "books")]
    assert shares == [STEPS * BATCH * 3 // 4, STEPS * BATCH // 4]
    for row in (row for rows in listed.values() for row in rows):
        content = Path(row["source"]).read_bytes()
        line = content.splitlines(keepends=True)[row["line"] - 1]
        assert content[row["offset"] : row["offset"] + len(line)] == line
        text = json.loads(line)["text"].rstrip()
        if row["begins"] == 0:
            assert text.startswith(row["text"]), row
        assert row["text"].strip() in text, row


def test_the_steps_whose_loss_stands_out_are_those_that_list_the_odd_document(
    site: Site, listed: dict[int, list[dict[str, Any]]]
):
    losses = {line["num_updates"]: line["loss"] for line in telemetry(site.lineage / "1.00" / "a1")}
    steps = range(31, STEPS)
    high = [step for step in steps if losses[step] > (losses[step - 1] + losses[step + 1]) / 2 + 0.15]
    assert len(high) >= 3
    assert set(odd_steps(site, listed)) <= set(high) <= set(odd_steps(site, listed, least=1))


def test_the_command_shows_what_the_step_had_and_the_loss_puts_the_odd_document_first(
    site: Site, listed: dict[int, list[dict[str, Any]]]
):
    step = odd_steps(site, listed)[0]
    attempt = "1.00-a1"
    plain = site.items("1", "--step", str(step), "--attempt", attempt)
    assert [
        {**row, "sample": row["sample"] - (step - 1) * BATCH, "text": one_line(row["text"])} for row in listed[step]
    ] == plain
    done = site.asked("1", "--step", str(step), "--attempt", attempt, "--loss", "-o", "json")
    assert done.returncode == 0, done.stderr
    newest = step // 10 * 10
    assert f"checkpoint of step {newest}, " in done.stderr
    assert (f"{step - newest} step" if step > newest else "itself") in done.stderr
    items = json.loads(done.stdout)["items"]
    assert is_odd(site, items[0])
    losses = [row["loss"] for row in items if row["loss"] is not None]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 3 * statistics.median(losses)
    assert CONTROL[0] not in done.stdout


def test_losses_are_those_of_training_under_the_weights_before_the_step(
    site: Site, listed: dict[int, list[dict[str, Any]]]
):
    """The step after a checkpoint has its very weights, so the losses of its parts give the loss in telemetry."""
    checkpoint = site.lineage / "1.00" / "checkpoints" / "step-00000030"
    rows = site.documents("--first", str(30 * BATCH), "--count", str(BATCH), "--checkpoint", str(checkpoint))
    opens = {id(group[0]) for group in by_sample(listed[31]).values()}
    begun = {
        (row["source"], row["line"], row["begins"], row["sample"] % BATCH) for row in listed[31] if id(row) in opens
    }
    total = 0.0
    for row in rows:  # the first token of a sample is not predicted
        first = (row["source"], row["line"], row["begins"], row["sample"]) in begun
        total += (row["loss"] or 0.0) * (row["tokens"] - first)
    (line,) = [line for line in telemetry(site.lineage / "1.00" / "a1") if line["num_updates"] == 31]
    assert total / (BATCH * SEQ_LEN) == pytest.approx(line["loss"], abs=1e-4)


def test_skipped_batches_are_left_out_and_the_discarded_attempt_shows_what_it_had(
    site: Site, listed: dict[int, list[dict[str, Any]]]
):
    def places(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(row["source"], row["line"], row["begins"], row["tokens"]) for row in rows]

    assert places(site.items("1", "--step", "33")) == places(listed[33 + 4])
    assert places(site.items("1", "--step", "33", "--attempt", "1.00-a1")) == places(listed[33])
    assert places(listed[33]) != places(listed[33 + 4])


def test_a_step_that_nobody_trained_and_an_attempt_that_is_none(site: Site):
    done = site.asked("1", "--step", "99")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no attempt of lineage 1 has a line of telemetry for step 99; telemetry has steps 1 to 60" in done.stderr
    done = site.asked("1", "--step", "20", "--attempt", "1.01-a1")
    assert done.returncode == 3
    assert "attempt 1.01-a1 did not train step 20; it was trained by 1.00-a1" in done.stderr
    done = site.asked("1", "--step", "20", "--attempt", "1.00-a9")
    assert "has no attempt 1.00-a9; known: 1.00-a1, 1.01-a1" in done.stderr
    done = site.asked("1", "--step", "5", "--loss")
    assert "there is no verified checkpoint at or before step 5; the first one is of step 10" in done.stderr


def test_the_table_is_short_and_another_trainer_cannot_answer(site: Site):
    done = site.asked("1", "--step", "20")
    assert done.stdout.splitlines()[0].split("\t") == ["SAMPLE", "CORPUS", "LINE", "TOKENS", "TEXT"]
    config = site.folder / "other.toml"
    config.write_text("[trainer]\ncommand = ['my-trainer']\n")
    done = site.asked("1", "--step", "20", "-c", str(config))
    assert done.returncode == 75
    assert "the trainer my-trainer cannot tell its documents" in done.stderr


def changed(site: Site, path: Path, content: str | None) -> str:
    """What the command says while a file of the data has another content; None: it is gone."""
    kept, times = path.read_text(), path.stat()
    path.unlink()
    try:
        if content is not None:
            path.write_text(content)
        done = site.asked("1", "--step", "20", "-o", "json")
    finally:
        path.write_text(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (done.returncode, done.stdout) == (1, ""), done
    return done.stderr


def test_data_that_is_gone_or_changed_is_refused_with_both_digests(site: Site):
    corpora = json.loads((site.lineage / "1.00/a1/config.json").read_text())["data"]["corpora"]
    was = {corpus["name"]: corpus["digest"] for corpus in corpora}
    other = site.wiki / "b.jsonl"
    said = changed(site, other, other.read_text().replace("bird", "word", 1))
    assert str(other) in said
    assert str(site.wiki / "a.jsonl") not in said
    assert (
        f"the digest of corpus wiki was {was['wiki']}, and is sha256:" in " ".join(said.split()) or was["wiki"] in said
    )
    assert said.count("sha256:") >= 2
    said = changed(site, site.books, None)
    assert f"{site.books} is gone: the digest of corpus books was {was['books']}, and there is none now" in said
    said = changed(site, other, None)
    assert f"{other} is gone" in said


def test_the_same_data_elsewhere_in_time_is_accepted(site: Site):
    """A copy with another time of change is not in the cache: it is tokenised again, and has the same digest."""
    times, before = site.books.stat(), site.items("1", "--step", "20")
    os.utime(site.books, (1, 1))
    try:
        shutil.rmtree(site.folder / "cache")
        assert site.items("1", "--step", "20") == before
    finally:
        os.utime(site.books, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand  blanks", "two lines and blanks"),
        ("\x1b[31mred\x07\u202e", "\\x1b[31mred\\x07\\u202e"),
        ("x" * 200, "x" * 79 + "…"),
        ("\x1b" * 80, "\\x1b" * 19 + "\\x1…"),
        ("ü" * 80, "ü" * 80),
    ],
)
def test_text_is_one_line_without_control_characters(text: str, shown: str):
    assert one_line(text) == shown
