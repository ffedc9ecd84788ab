"""`ckpt evaluate` of a really trained checkpoint by the real harness: right numbers, each once, whoever is killed."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.state.status import Status
from tests.e2e.site import Site, until
from tests.e2e.trained import harnesses

SETTINGS = (
    "steps=12",
    "checkpoint_every=6",
    "evaluate_every=100",
    "peer_copies.every=0",
    "data.seq_len=64",
    "model.num_layers=1",
    "model.hidden_size=32",
    "optim.warmup_steps=4",
)
TEXTS = [" ".join(topics[name].split())[: 40 + 13 * n] for n, name in enumerate(sorted(topics)[:50])]
"""From a few words to far more tokens than the model has positions."""
WORDS = (" red", " the value", " of a class", " is returned")
QUESTIONS = 48

HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
metadata:
  version: 1.0
"""
CHOICE = """doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""


class Trained:
    """A site with one lineage whose training is over, and the trainer's own forward pass on its checkpoint."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.folder = site.runs / "1" / "evaluations" / "step-00000012"
        self.checkpoint = site.runs / "1" / "1.00" / "checkpoints" / "step-00000012"

    def model(self) -> tuple[Any, Any]:
        """The trainer's model, and the tokenizer that it was trained with, which puts no `</s>` anywhere."""
        from tokenizers import Tokenizer

        from tests.trainer.own_model import model_of
        from trainer.convert.__main__ import read
        from trainer.data.corpus import training_corpora
        from trainer.data.tokens import find

        weights = read(self.checkpoint)
        text = find(None, training_corpora([]), weights.config.vocab_size).text
        return model_of(weights), Tokenizer.from_str(text)

    def evaluate(self, *words: str, code: int = 0, **environment: str) -> Any:
        said = self.site.command("ckpt", "evaluate", "1/12", *words, "-o", "json", code=code, **environment)
        return json.loads(said) if code == 0 else said


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    site = Site(
        tmp_path_factory.mktemp("evaluate"),
        "[local]\nnodes = ['n1']\n[evaluate]\ntasks = ['mine']",
        trainer=f"'{sys.executable}', '-m', 'trainer'",
    )
    kept = os.environ.get("HF_HOME")
    os.environ["HF_HOME"] = str(site.folder / "hub")  # no file of this user's cache is read or written
    words = [f"--set={each}" for each in SETTINGS]
    site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
    site.start_daemon()
    assert site.ended().status is Status.COMPLETED
    site.end_daemon()
    yield Trained(site)
    site.close()
    os.environ.pop("HF_HOME") if kept is None else os.environ.update(HF_HOME=kept)


@pytest.fixture(scope="module")
def forward(trained: Trained) -> Forward:
    return Forward(*trained.model())


class Forward:
    """Log-likelihoods, in nats, by the trainer's own model: exactly one `</s>` stands before a text."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.positions: int = model.config.max_positions

    def tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def of_text(self, text: str) -> float:
        """In disjoint windows. Only the last one sees tokens of the one before it, as many as there is room for."""
        tokens, most = [2, *self.tokens(text)], self.positions
        total = self._sum(tokens[: most + 1], most)
        for begin in range(most, len(tokens) - 1, most):
            end = min(begin + most, len(tokens) - 1)
            total += self._sum(tokens[max(0, end - most) : end + 1], end - begin)
        return total

    def of_continuation(self, context: str, continuation: str) -> float:
        tokens = [2, *self.tokens(context + continuation)]
        return self._sum(tokens, len(tokens) - 1 - len(self.tokens(context)))

    def _sum(self, tokens: list[int], last: int) -> float:
        """Of the last tokens, given those before them."""
        with torch.no_grad():
            logits = self._model(torch.tensor([tokens[:-1]]))[0][0, :, : self._model.config.vocab_size].float()
        each = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]]
        return each[max(0, len(each) - last) :].double().sum().item()


@pytest.fixture(scope="module")
def asked(trained: Trained, forward: Forward) -> None:
    """Tasks of one's own: texts; questions whose answer is what this model prefers; and questions without sense."""
    folder = trained.site.folder / "mine"
    folder.mkdir()
    draw = random.Random(3)
    questions = [f"Question {n}: what is {draw.choice(sorted(topics)).lower()}?" for n in range(QUESTIONS)]
    preferred = [max(range(len(WORDS)), key=lambda n: forward.of_continuation(each, WORDS[n])) for each in questions]
    assert len(set(preferred)) > 1, "the model would score 1.0 with any question"
    for name, golds in (("known", preferred), ("chance", [draw.randrange(len(WORDS)) for _ in questions])):
        _task(folder, name, "multiple_choice", CHOICE)
        lines = [{"question": q, "choices": WORDS, "gold": gold} for q, gold in zip(questions, golds, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _task(folder, "texts", "loglikelihood_rolling", ROLLING)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    broken = trained.site.folder / "broken"
    broken.mkdir()
    _task(broken, "absent", "loglikelihood_rolling", ROLLING)
    (broken / "torn.yaml").write_text("task: [torn\n")
    (trained.site.folder / "prompts.txt").write_text("The value of\n\nA class is\n")


def _task(folder: Path, name: str, kind: str, rest: str) -> None:
    head = HEAD.format(name=name, file=folder / f"{name}.jsonl", kind=kind)
    (folder / f"{name}.yaml").write_text(head + rest)


PROMPTS = ("--prompts", "prompts.txt", "--tokens", "8")


@pytest.fixture(scope="module")
def told(trained: Trained, asked: None) -> dict[str, Any]:
    """What the command says in the end, after two of them were killed: before the first result, and after it."""
    for comes in (lambda: harnesses(trained.site), lambda: list(trained.folder.glob("*.0-shot.json"))):
        command = _started(trained, "--tasks", "mine", *PROMPTS)
        until(comes)
        (child,) = harnesses(trained.site)
        assert os.getpgid(child) == os.getpgid(command.pid) == command.pid, "a node agent ends the group"
        time.sleep(random.random() / 2)
        command.kill()
        command.wait()
        until(lambda: not harnesses(trained.site))
    assert not list((trained.site.runs / "1" / "inbox").glob("*.json"))
    done = {path: path.read_bytes() for path in trained.folder.glob("*.0-shot.json")}
    failed = trained.evaluate("--tasks", "mine,./broken", *PROMPTS, code=1)
    assert "task absent" in failed
    assert "absent.jsonl" in failed, "the harness's last lines are shown"
    assert "task torn: while parsing a flow sequence in" in failed
    assert r"broken/torn.yaml\", line 1" in failed, "where the mistake is"
    assert all(path.read_bytes() == content for path, content in done.items()), "what was finished is not done again"
    return trained.evaluate("--tasks", "mine", *PROMPTS)


def test_a_task_of_ones_own_never_takes_the_place_of_the_harnesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trainer.harness import scoring

    class Listed:
        all_tasks = ("piqa",)

        def __init__(self, include_path: str | None, include_defaults: bool) -> None:
            self.given = include_path, include_defaults

    monkeypatch.setattr(scoring, "TaskManager", Listed)  # the real one reads 14,000 files
    (tmp_path / "piqa.yaml").write_text("task: piqa\n")
    own = str(tmp_path / "piqa.yaml")
    tasks: Any = scoring.Tasks([own, "piqa"])
    assert tasks.manager("piqa").given == (None, True)
    assert tasks.manager(own).given == (str(tmp_path), False)


def test_tasks_of_one_name_keep_the_documents_of_each(tmp_path: Path):
    from trainer.harness.scoring import keep_documents

    for definition, texts in (("aa", "one\n"), ("bb", "two\n"), ("aa", "one\n"), ("", "three\n"), ("bb", "two\n")):
        keep_documents(tmp_path, "mine", definition, texts)
    there = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert there == {
        "mine.jsonl": "one\n",
        "mine+bb.jsonl": "two\n",
        f"mine+lm-eval-{version('lm-eval')}.jsonl": "three\n",
    }


def test_weights_that_are_larger_than_the_free_memory_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trainer.harness import loading

    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:       2 kB\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(2049))
    monkeypatch.setattr(loading, "_MEMORY", tmp_path / "meminfo")
    with pytest.raises(loading.NoRoom, match="memory are free here"):
        loading.load(tmp_path)


def test_what_a_killed_evaluation_has_left_of_its_answers_is_removed(tmp_path: Path):
    from trainer.harness.scoring import _write_answers

    for name in (".mine.answers.jsonl.gz.77.tmp", ".other.answers.jsonl.gz.77.tmp"):
        (tmp_path / name).write_text("half of it")
    _write_answers(tmp_path / "mine.answers.jsonl.gz", {})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.answers.jsonl.gz", ".other.answers.jsonl.gz.77.tmp"}


def _started(trained: Trained, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "opt_ops", "ckpt", "evaluate", "1/12", *words]
    return subprocess.Popen(
        command, cwd=trained.site.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _scores(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["task"]: item for item in told["items"]}


def test_log_likelihoods_are_those_of_the_trainers_forward_pass(
    trained: Trained, told: dict[str, Any], forward: Forward
):
    with gzip.open(trained.folder / "texts.0-shot.answers.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert [line["doc"] for line in lines] == list(range(len(TEXTS)))
    expected = [forward.of_text(text) for text in TEXTS]
    assert sum(len(forward.tokens(text)) > forward.positions for text in TEXTS) > 10
    for line, value in zip(lines, expected, strict=True):
        assert line["answers"][0] == pytest.approx(value, abs=1e-4)
    bits = -sum(expected) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert _scores(told)["texts"]["value"] == pytest.approx(bits, abs=1e-6)
    assert _scores(told)["texts"]["bos"] is False, "the harness itself puts one `</s>` there"


def test_a_model_scores_what_it_must_and_chance_where_it_cannot_know(told: dict[str, Any]):
    known, chance = _scores(told)["known"], _scores(told)["chance"]
    assert (known["value"], known["n"], known["shots"], known["bos"]) == (1.0, QUESTIONS, 0, True)
    assert abs(chance["value"] - 1 / len(WORDS)) < 3 * chance["stderr"]
    assert (known["harness"], known["run"], known["step"]) == ("lm-eval 0.4.13", "1.00", 12)
    assert known["task_version"].startswith("1.0+"), "of the folder's files, too"


def test_the_documents_are_written_for_the_next_corpus(trained: Trained, told: dict[str, Any]):
    file = trained.site.runs / "1" / "evaluations" / "documents" / "texts.jsonl"
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == TEXTS


def test_prompts_are_completed(told: dict[str, Any]):
    assert [each["prompt"] for each in told["samples"]] == ["The value of", "A class is"]
    assert all(each["greedy"] and each["drawn"] for each in told["samples"])


def test_each_key_is_in_the_journal_once_and_a_second_call_runs_nothing(trained: Trained, told: dict[str, Any]):
    site, keys = trained.site, {"known", "chance", "texts"}
    assert all(item["ran"] is False and item["settled"] for item in told["items"]), "the call before had run them"
    waiting = list((site.runs / "1" / "inbox").glob("*.json"))
    assert len(waiting) == len(keys) + 1, "without a daemon, requests wait for the next one"
    site.start_daemon()
    until(lambda: not min(waiting).exists())
    site.kill_daemon()
    site.start_daemon()
    until(lambda: not list((site.runs / "1" / "inbox").glob("*.json")))
    assert trained.evaluate("--tasks", "mine", *PROMPTS) == told
    site.end_daemon()
    events = [entry.event for entry in site.entries()]
    scores = [event for event in events if isinstance(event, CheckpointEvaluated)]
    assert sorted(event.task for event in scores) == sorted(keys)
    assert len({score_key(event) for event in scores}) == len(scores)
    assert sum(isinstance(event, CheckpointSampled) for event in events) == 1

    shutil.move(trained.folder, f"{trained.folder}.away")
    assert trained.evaluate("--tasks", "mine", *PROMPTS) == told, "the journal alone knows it"
    shutil.rmtree(trained.folder)
    shutil.move(f"{trained.folder}.away", trained.folder)


def test_without_the_harness_the_command_that_installs_it_is_named(trained: Trained, asked: None, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'lm_eval': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    said = trained.evaluate("--tasks", "mine", code=2, PYTHONPATH=str(tmp_path))
    assert "lm-evaluation-harness is not installed" in said
    assert "pip install 'opt-ops[evaluate]'" in said


def test_a_damaged_checkpoint_ends_the_command_before_the_harness_starts(trained: Trained, told: dict[str, Any]):
    config = trained.site.folder / "opt-ops.toml"
    witness = trained.site.folder / "python"
    witness.write_text(f'#!/bin/sh\ntouch {trained.site.folder}/started\nexec {sys.executable} "$@"\n')
    witness.chmod(0o755)
    before = config.read_text()
    config.write_text(before.replace("[evaluate]", "[evaluate]\npython = './python'"))
    trained.evaluate("--tasks", "mine")
    started = trained.site.folder / "started"
    assert started.exists()
    started.unlink()
    shard = max(trained.checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert "damaged" in trained.evaluate("--tasks", "mine", code=65)
        assert not started.exists()
    finally:
        shard.write_bytes(content)
        config.write_text(before)


def test_what_cannot_be_evaluated_is_refused(trained: Trained, asked: None):
    assert "no checkpoint of step 7" in trained.site.command("ckpt", "evaluate", "1/7", "--tasks", "piqa", code=3)
    assert "is no folder" in trained.evaluate("--tasks", "./elsewhere", code=3)
    assert "no such file" in trained.evaluate("--prompts", "elsewhere.txt", code=3)
