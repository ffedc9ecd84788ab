import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.harness import REPOSITORY, wait_for
from trainer.data import tokens
from trainer.data.corpus import Corpus, CorruptLine, documents, whole
from trainer.data.tokens import BuildLimits, TokenFile, builder, encode
from trainer.data.tokens.builder import cut
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
    load([text])
    return next(cache.glob("tokens-*/tokenizer.json"))


def load(
    paths: Sequence[Path],
    tokenizer: Path | None = None,
    vocab_size: int = 512,
    corrupt_lines: int = 0,
    workers: int = 2,
) -> TokenFile:
    corpus = Corpus(name="few", paths=tuple(paths))
    definition = tokens.find(tokenizer, [corpus], vocab_size)
    return tokens.load(corpus, definition, BuildLimits(corrupt_lines=corrupt_lines, workers=workers))


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def decoded(file: TokenFile, tokenizer: Path) -> list[str]:
    """The documents again, without the end of each."""
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer))
    pieces = [file.ids[begin : end - 1].tolist() for begin, end in zip(file.bounds, file.bounds[1:], strict=False)]
    return [decoder.decode(piece, skip_special_tokens=False) for piece in pieces]


def test_the_token_file_is_the_text_with_an_end_after_each_document(text: Path, trained: Path) -> None:
    loaded = load([text])
    assert decoded(loaded, trained) == [json.loads(line)["text"].rstrip() for line in text.read_text().splitlines()]
    assert loaded.bounds[0] == 0
    assert (loaded.ids[loaded.bounds[1:] - 1] == encode.END_OF_DOCUMENT).all()
    assert (loaded.ids == encode.END_OF_DOCUMENT).sum() == 12
    assert loaded.ids.max() < 512
    assert loaded.ids.dtype == np.uint16
    assert isinstance(loaded.ids, np.memmap)


def test_special_tokens_have_the_ids_of_opt(trained: Path) -> None:
    vocabulary = json.loads(trained.read_text())["model"]["vocab"]
    assert [vocabulary[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]


def test_text_that_spells_a_special_token_is_text(tmp_path: Path, trained: Path) -> None:
    loaded = load([jsonl(tmp_path / "a.jsonl", "An end: </s> is not one.")], trained)
    assert (loaded.ids == encode.END_OF_DOCUMENT).sum() == 1
    assert decoded(loaded, trained) == ["An end: </s> is not one."]


def test_blank_space_at_the_end_and_empty_documents_are_dropped(tmp_path: Path, trained: Path) -> None:
    plain = load([jsonl(tmp_path / "a.jsonl", "The cat.", "The dog.")], trained)
    padded = load([jsonl(tmp_path / "b.jsonl", "The cat. \n", "", "  ", "The dog.\n")], trained)
    assert padded.ids.tolist() == plain.ids.tolist()
    assert padded.digest == plain.digest


def test_the_cache_is_used_until_text_or_tokenizer_change(
    tmp_path: Path, cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(text.read_bytes())
    first = load([own])
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "build", None)
        again = load([own])
    assert (again.digest, again.tokenizer) == (first.digest, first.tokenizer)
    assert np.array_equal(again.ids, first.ids)
    with own.open("a") as file:
        file.write('{"text": "One more."}\n')
    assert load([own]).digest != first.digest
    load([own], vocab_size=400)
    assert len(list(cache.glob("tokens-*/ids.npy"))) == 3
    assert not list(cache.glob(".tokens-*")), "a build left its files"


def test_an_entry_that_is_damaged_is_built_again(text: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = load([text])
    ids = np.array(first.ids)
    (entry,) = (path.parent for path in cache.glob("tokens-*/ids.npy"))
    for name, length in (("ids.npy", 0.5), ("ids.npy", 0), ("bounds.npy", 0.5), ("about.json", 0.5), ("ids.npy", None)):
        if length is None:
            (entry / name).unlink()
        else:
            os.truncate(entry / name, int((entry / name).stat().st_size * length))
        again = load([text])
        assert (again.digest, np.array_equal(again.ids, ids)) == (first.digest, True), name
        assert capfd.readouterr().err.count("is damaged, and is built again") == 1, name
    load([text])
    assert not capfd.readouterr().err


def test_gpt2_style_files_and_tokenizer_json_give_the_same_tokens(tmp_path: Path, text: Path, trained: Path) -> None:
    model = json.loads(trained.read_text())["model"]
    pair = tmp_path / "pair"
    pair.mkdir()
    (pair / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (pair / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    assert load([text], pair).digest == load([text], trained).digest


def errors(tmp_path: Path, trained: Path) -> dict[str, tuple[list[Path], Path | None, int]]:
    good = jsonl(tmp_path / "good.jsonl", "The cat.")
    bad, untexted = tmp_path / "bad.jsonl", tmp_path / "untexted.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": "torn\n')
    untexted.write_text('{"text": "fine"}\n{"text": "fine"}\n{"body": "no text"}\n')
    alien = json.loads(trained.read_text())
    alien["added_tokens"] = []
    alien["model"]["vocab"] = {f"x{i}" if i < 4 else token: i for token, i in alien["model"]["vocab"].items()}
    (tmp_path / "alien.json").write_text(json.dumps(alien))
    (tmp_path / "broken.json").write_text("{}")
    return {
        r"missing\.jsonl: no such file": ([tmp_path / "missing.jsonl"], None, 512),
        r"bad\.jsonl:2: not a JSON object .*More corrupt lines than data\.max_corrupt_lines=0": ([bad], trained, 512),
        r"untexted\.jsonl:3: not a JSON object": ([untexted], trained, 512),
        r"the tokenizer has \d+ tokens but model\.vocab_size is 270": ([good], trained, 270),
        r"--tokenizer .*nowhere: expected a tokenizer\.json": ([good], tmp_path / "nowhere", 512),
        r"alien\.json: its first tokens are \('x0', 'x1', 'x2', 'x3'\)": ([good], tmp_path / "alien.json", 512),
        r"broken\.json: not a tokenizer": ([good], tmp_path / "broken.json", 512),
    }


def test_what_is_wrong_with_text_or_tokenizer_is_said(tmp_path: Path, trained: Path) -> None:
    for why, arguments in errors(tmp_path, trained).items():
        with pytest.raises(UserError, match=why):
            load(*arguments)


def spoilt(path: Path, text: Path, bad: Sequence[int]) -> Path:
    lines = text.read_text().splitlines(keepends=True)
    for number in bad:
        lines[number - 1] = lines[number - 1][:-9] + "\n"
    path.write_text("".join(lines))
    return path


def test_corrupt_lines_up_to_the_limit_are_reported_and_left_out(
    tmp_path: Path, text: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spoilt(tmp_path / "spoilt.jsonl", text, [3, 8])
    loaded = load([path], trained, corrupt_lines=2)
    assert [line.partition(": ")[0] for line in loaded.corrupt_lines] == [f"{path}:3", f"{path}:8"]
    assert len(decoded(loaded, trained)) == 10
    err = capsys.readouterr().err
    assert err.startswith(f'{path}:3: not a JSON object with a string "text" in UTF-8 (not JSON: ')
    assert err.count("; skipped\n") == 2
    assert f"{path}:8: " in err
    with pytest.raises(UserError, match=r"2 corrupt lines that were skipped, more than data\.max_corrupt_lines=1"):
        load([path], trained, corrupt_lines=1)


def test_above_the_limit_nothing_is_built_and_what_was_read_is_not_read_again(
    tmp_path: Path, text: Path, trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spoilt(tmp_path / "spoilt.jsonl", text, [3, 8, 9])
    with pytest.raises(UserError, match=rf"{path}:3: .*; {path}:8: .*; {path}:9: .*max_corrupt_lines=2"):
        load([path], trained, corrupt_lines=2)
    assert len(list(cache.glob("tokens-*/ids.npy"))) == 1, "that of the tokenizer"
    monkeypatch.setattr(encode, "encode", None)
    assert len(load([path], trained, corrupt_lines=3).corrupt_lines) == 3


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a few documents are many pieces."""
    monkeypatch.setattr(builder, "PIECE", 1000)


def test_the_tokens_do_not_depend_on_workers_or_pieces(
    tmp_path: Path, text: Path, trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, pieces: None
) -> None:
    path = spoilt(tmp_path / "spoilt.jsonl", text, [3, 8])
    built = []
    for workers, piece in ((1, 1000), (2, 1000), (2, 7000), (1, 1 << 24)):
        monkeypatch.setattr(builder, "PIECE", piece)
        monkeypatch.setenv("OPT_OPS_CACHE", str(cache / f"{workers}-{piece}"))
        built.append(load([path], trained, corrupt_lines=2, workers=workers))
    assert len(cut([path])) == 1
    for other in built[1:]:
        assert other.digest == built[0].digest
        assert np.array_equal(other.bounds, built[0].bounds)
        assert other.corrupt_lines == built[0].corrupt_lines


def test_small_files_share_a_piece_and_large_ones_are_cut(tmp_path: Path, text: Path, pieces: None) -> None:
    small = [jsonl(tmp_path / f"{i}.jsonl", "The cat.") for i in range(3)]
    found = cut([*small, text])
    assert [span.path for span in found[0]] == [*small, text]
    read = [line for piece in found for span in piece for line in documents(span)]
    assert read == [line for path in (*small, text) for line in documents(whole(path))]
    assert len(found) > text.stat().st_size / 1000


def test_text_that_changes_meanwhile_is_not_taken(
    tmp_path: Path, text: Path, trained: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(text.read_bytes())
    plain = encode.encode

    def encode_while_it_grows(*args: object) -> encode.TokenPart:
        with own.open("a") as file:
            file.write('{"text": "One more."}\n')
        return plain(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(encode, "encode", encode_while_it_grows)
    with pytest.raises(UserError, match="its files changed while they were read"):
        load([own], trained)
    assert not list(cache.glob(".tokens-*"))


def test_what_nobody_came_back_to_for_long_is_removed(tmp_path: Path, trained: Path, cache: Path) -> None:
    old, new = cache / ".tokens-old.parts", cache / ".tokens-new.parts"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part.npz").write_text("")
    os.utime(old, (0, 0))
    load([jsonl(tmp_path / "a.jsonl", "The cat.")], trained)
    assert list(cache.glob(".tokens-*")) == [new]


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_part_that_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "part.npz"
    part = encode.TokenPart(np.arange(500, dtype=np.uint16), np.array([300, 200]), [CorruptLine("a.jsonl", 3, "why")])
    encode.write(path, part)
    found = encode.read(path)
    assert found is not None
    assert np.array_equal(found.ids, part.ids)
    assert np.array_equal(found.lengths, part.lengths)
    assert found.corrupt == part.corrupt
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-40:]
    else:
        content[400] ^= 1
    path.write_bytes(content)
    assert encode.read(path) is None
    assert encode.read(tmp_path / "none.npz") is None


def test_a_worker_that_dies_is_told(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, pieces: None
) -> None:
    own = jsonl(tmp_path / "own.jsonl", *["The cat sat on the mat. " * 30] * 9)
    monkeypatch.setattr(encode, "serve", die)
    with pytest.raises(RuntimeError, match=r"has died, perhaps because memory was short"):
        load([own], trained)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


BUILD = """
import sys, time
from trainer.data.tokens import builder
from trainer.tokens import __main__ as program
if __name__ == "__main__":
    builder.PIECE = 20_000
    join = builder._join
    def held(entry, *rest):  # while there is a file `hold`, no build ends
        while (entry.parent / "hold").exists():
            time.sleep(0.01)
        join(entry, *rest)
    builder._join = held
    sys.exit(program.main())
"""


def build(text: Path, tokenizer: Path, cache: Path, *more: str, workers: int = 2) -> subprocess.Popen[str]:
    script = cache.parent / "build.py"
    if not script.exists():  # one that was started before may be about to read it
        script.write_text(BUILD)
    arguments = ["build", "--data", text, "--tokenizer", tokenizer, "--workers", workers, *more]
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"OPT_OPS_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def waits_for_a_lock(pid: int) -> bool:
    """By /proc/locks: `1: -> FLOCK  ADVISORY  WRITE <pid> …` waits for the one above it."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(words[1] == "->" and words[5] == str(pid) for words in lines)


def test_killed_at_any_time_it_goes_on_where_it_was(tmp_path: Path, text: Path, trained: Path, cache: Path) -> None:
    large = jsonl(tmp_path / "large.jsonl", *(f"{i} " + "The cat sat on the mat. " * 300 for i in range(300)))
    killed = build(large, trained, cache)
    wait_for(lambda: len(list(cache.glob(".tokens-*.parts/*.npz"))) >= 5, "no parts")
    workers = children(killed.pid)
    killed.kill()
    killed.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers outlive their parent")
    assert len(workers) >= 2
    (folder,) = cache.glob(".tokens-*.parts")
    parts = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert not list(cache.glob("tokens-*/about.json"))[1:], "it was done already"

    again = build(large, trained, cache)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    made_before, of = map(int, re.findall(r"data: (\d+) of (\d+) parts exist already", err)[0])
    assert 5 <= made_before == len(parts) < of
    assert "data: " in out
    undisturbed = build(large, trained, tmp_path / "other", workers=1)
    assert undisturbed.communicate(timeout=240)[0] == out

    def digest(folder: Path) -> list[str]:
        found = [json.loads(path.read_text()) for path in folder.glob("tokens-*/about.json")]
        return [about["digest"] for about in found if about["documents"] == 300]

    assert digest(cache) == digest(tmp_path / "other")
    assert len(digest(cache)) == 1


def test_one_builds_the_others_wait_and_a_killed_builder_blocks_nobody(
    tmp_path: Path, trained: Path, cache: Path
) -> None:
    large = jsonl(tmp_path / "large.jsonl", *(f"{i} " + "The cat sat on the mat. " * 300 for i in range(500)))
    (cache / "hold").touch()
    first = build(large, trained, cache)
    wait_for(lambda: bool(list(cache.glob(".tokens-*.parts"))), "no build")
    others = [build(large, trained, cache) for _ in range(3)]
    wait_for(lambda: all(waits_for_a_lock(process.pid) for process in others), "they do not wait")
    first.kill()
    first.communicate()
    (cache / "hold").unlink()
    outputs = [process.communicate(timeout=240) for process in others]
    assert [process.returncode for process in others] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1


def test_whoever_waits_for_a_build_hears_that_it_gets_on(
    tmp_path: Path, text: Path, trained: Path, cache: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder.cache, "LOOK_EVERY_SECONDS", 0.01)
    many = jsonl(tmp_path / "many.jsonl", *[f"Document {i}. " + text.read_text()[:200] for i in range(400)])
    corpus = Corpus(name="many", paths=(many,))
    definition, limits = tokens.find(trained, [corpus], 512), BuildLimits(corrupt_lines=0, workers=1)
    heard = []
    first = tokens.load(corpus, definition, limits, lambda: heard.append(threading.current_thread()))
    assert heard
    assert threading.main_thread() not in heard
    assert not any(thread.is_alive() for thread in heard), "it goes on looking"
    heard.clear()
    again = tokens.load(corpus, definition, limits, lambda: heard.append(threading.current_thread()))
    assert again.digest == first.digest
    assert heard == [], "nothing was built"


def test_a_build_that_stands_still_is_not_told_of(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.cache, "LOOK_EVERY_SECONDS", 0.01)
    parts = cache / ".tokens-0.parts"
    parts.mkdir(parents=True)
    heard = threading.Event()
    with builder.cache.watched(cache, "tokens-0", heard.set):
        assert not heard.wait(0.2)
        (cache / ".tokens-1.parts").mkdir()
        assert not heard.wait(0.2), "another one's build"
        (parts / "part-000000-of-000001.npz").touch()
        assert heard.wait(240)


def test_the_program_tells_users_what_is_wrong(tmp_path: Path, text: Path, trained: Path, cache: Path) -> None:
    path = spoilt(tmp_path / "spoilt.jsonl", text, [3])
    strict = build(path, trained, cache, "--max-corrupt-lines", "0")
    _, err = strict.communicate(timeout=240)
    assert strict.returncode == 78
    assert f"error: {path}:3: not a JSON object" in err
    lenient = build(path, trained, cache)
    out, err = lenient.communicate(timeout=240)
    assert lenient.returncode == 0, err
    assert re.fullmatch(r"data: [\d,]+ tokens in 11 documents, 1 corrupt lines skipped\n", out)
    unknown = build(path, trained, cache, "--worker")
    _, err = unknown.communicate(timeout=240)
    assert unknown.returncode == 78
    assert err == "error: unrecognized arguments: --worker; --help shows examples.\n"


def test_a_terminal_sees_a_bar(tmp_path: Path, text: Path, trained: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.tokens", "build", "--data", text, "--tokenizer", trained],
        cwd=REPOSITORY,
        env=os.environ | {"OPT_OPS_CACHE": str(tmp_path / "fresh")},
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    drawings = shown.decode().split("\r\x1b[K")
    assert drawings[1].startswith("░" * 30 + " data:   0% of 0 MB, 0 tokens")
    assert drawings[-1].startswith("█" * 30 + " data: 100% of 0 MB")


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:  # its other end is closed
        return b""
