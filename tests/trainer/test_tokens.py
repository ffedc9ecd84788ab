import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.harness import REPOSITORY
from trainer import corpus, tokens
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("OPT_OPS_CACHE", str(path))
    return path


@pytest.fixture(scope="module")
def text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of it, which takes no time."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(text.read_text().splitlines(keepends=True)[:12]))
    return path


@pytest.fixture
def trained(text: Path, cache: Path) -> Path:
    """A tokenizer.json, as the trainer makes it."""
    tokens.load([text], None, 512)
    return next(cache.glob("tokens-*/tokenizer.json"))


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_token_file_is_the_text_with_an_end_after_each_document(text: Path, trained: Path) -> None:
    from tokenizers import Tokenizer

    loaded = tokens.load([text], None, 512)
    documents = " ".join(map(str, loaded.ids.tolist())).split(" 2 ")
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert len(documents) == len(texts)
    assert loaded.ids[-1] == tokens.END_OF_DOCUMENT
    first = [int(i) for i in documents[0].split()]
    assert Tokenizer.from_file(str(trained)).decode(first) == texts[0].rstrip()
    assert loaded.ids.max() < 512
    assert loaded.ids.dtype == np.uint16


def test_special_tokens_have_the_ids_of_opt(trained: Path) -> None:
    vocabulary = json.loads(trained.read_text())["model"]["vocab"]
    assert [vocabulary[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]


def test_blank_space_at_the_end_and_empty_documents_are_dropped(tmp_path: Path, trained: Path) -> None:
    plain = tokens.load([jsonl(tmp_path / "a.jsonl", "The cat.", "The dog.")], trained, 512)
    padded = tokens.load([jsonl(tmp_path / "b.jsonl", "The cat. \n", "", "  ", "The dog.\n")], trained, 512)
    assert padded.ids.tolist() == plain.ids.tolist()
    assert padded.digest == plain.digest


def test_the_cache_is_used_until_text_or_vocabulary_change(
    tmp_path: Path, cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(text.read_bytes())
    first = tokens.load([own], None, 512)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_build", None)
        again = tokens.load([own], None, 512)
    assert (again.digest, again.tokenizer) == (first.digest, first.tokenizer)
    assert np.array_equal(again.ids, first.ids)
    with own.open("a") as file:
        file.write('{"text": "One more."}\n')
    assert tokens.load([own], None, 512).digest != first.digest
    tokens.load([own], None, 400)
    assert len(list(cache.glob("tokens-*/ids.npy"))) == 3


def test_folders_are_searched_in_a_fixed_order(tmp_path: Path, trained: Path) -> None:
    jsonl(tmp_path / "d" / "b.jsonl", "The dog.")
    jsonl(tmp_path / "d" / "a" / "z.jsonl", "The cat.")
    (tmp_path / "d" / "notes.md").write_text("not data")
    files = corpus.jsonl_files([tmp_path / "d"])
    assert [file.name for file in files] == ["z.jsonl", "b.jsonl"]


def test_gpt2_style_files_and_tokenizer_json_give_the_same_tokens(tmp_path: Path, text: Path, trained: Path) -> None:
    model = json.loads(trained.read_text())["model"]
    pair = tmp_path / "pair"
    pair.mkdir()
    (pair / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (pair / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    assert tokens.load([text], pair, 512).digest == tokens.load([text], trained, 512).digest


def errors(tmp_path: Path, trained: Path) -> dict[str, tuple[list[Path], Path | None, int]]:
    good = jsonl(tmp_path / "good.jsonl", "The cat.")
    bad, untexted, empty = tmp_path / "bad.jsonl", tmp_path / "untexted.jsonl", tmp_path / "empty"
    bad.write_text('{"text": "fine"}\n{"text": "torn\n')
    (tmp_path / "latin1.jsonl").write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))
    untexted.write_text('{"text": "fine"}\n{"text": "fine"}\n{"body": "no text"}\n')
    empty.mkdir()
    alien = json.loads(trained.read_text())
    alien["added_tokens"] = []
    alien["model"]["vocab"] = {f"x{i}" if i < 4 else token: i for token, i in alien["model"]["vocab"].items()}
    (tmp_path / "alien.json").write_text(json.dumps(alien))
    (tmp_path / "broken.json").write_text("{}")
    return {
        r"--data .*missing\.jsonl: no such file": ([tmp_path / "missing.jsonl"], None, 512),
        r"--data .*empty: the folder holds no \*\.jsonl": ([empty], None, 512),
        r"bad\.jsonl:2: not a JSON object": ([bad], trained, 512),
        r"latin1\.jsonl:1: not a JSON object": ([tmp_path / "latin1.jsonl"], trained, 512),
        r"untexted\.jsonl:3: not a JSON object": ([untexted], trained, 512),
        r"the tokenizer has \d+ tokens but model\.vocab_size is 270": ([good], trained, 270),
        r"--tokenizer .*nowhere: expected a tokenizer\.json": ([good], tmp_path / "nowhere", 512),
        r"alien\.json: its first tokens are \('x0', 'x1', 'x2', 'x3'\)": ([good], tmp_path / "alien.json", 512),
        r"broken\.json: not a tokenizer": ([good], tmp_path / "broken.json", 512),
    }


def test_what_is_wrong_with_text_or_tokenizer_is_said(tmp_path: Path, cache: Path, trained: Path) -> None:
    for why, arguments in errors(tmp_path, trained).items():
        with pytest.raises(UserError, match=why):
            tokens.load(*arguments)
    assert not list(cache.glob(".tokens-*")), "a failed build left its files"


BUILD = """
import sys, time, pathlib
from trainer import tokens
build = tokens._build
def slow(*args):
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    build(*args)
tokens._build = slow
print(tokens.load([pathlib.Path(sys.argv[1])], None, 512).digest, flush=True)
"""


def builder(text: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(text), str(seconds)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_one_builds_the_others_wait_and_a_killed_builder_blocks_nobody(text: Path) -> None:
    killed = builder(text, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "building\n"
    waiting = [builder(text, 0.3) for _ in range(3)]
    time.sleep(0.5)
    assert [process.poll() for process in waiting] == [None] * 3, "they did not wait"
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    outputs = [process.communicate(timeout=60)[0].split() for process in waiting]
    assert sorted(len(words) for words in outputs) == [1, 1, 2], "not exactly one of them built"
    assert len({words[-1] for words in outputs}) == 1


def test_the_standard_library_has_prose_enough() -> None:
    files = corpus.standard_library_files()
    assert files == corpus.standard_library_files()
    topics = next(file for file in files if file.parts[-2:] == ("pydoc_data", "topics.py"))
    prose = "".join(corpus.documents(topics))
    assert len(prose) > 400_000
    assert 'The "assert" statement' in prose
