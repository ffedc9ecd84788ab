"""What somebody meets who gives the wrong file, the wrong key or the wrong name for the first time."""

import gzip
import json
from pathlib import Path

import pytest

from trainer import recipes
from trainer.check import check
from trainer.data.corpus import CorruptLine, documents, jsonl_files, whole
from trainer.data.lines import named, text_of
from trainer.errors import UserError

OBJECT = '{"text": "The cat sat."}\n'


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(documents(whole(path)))
    said = str(caught.value)
    assert said.startswith(f"{path}"), said
    return said


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl.gz", gzip.compress(OBJECT.encode(), mtime=0), "packed by gzip. Unpack it first: gunzip -c"),
        ("a.jsonl", gzip.compress(OBJECT.encode(), mtime=0), "packed by gzip"),
        ("a.zst", b"\x28\xb5\x2f\xfd\x04\x00", "packed by zstd"),
        ("a.parquet", b"PAR1\x15\x04\x15", "a Parquet file"),
        ("a.bin", bytes(range(256)), "a binary file"),
        ("a.jsonl", OBJECT.encode("utf-16"), "in UTF-16, and not in UTF-8. Convert it: iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", OBJECT.encode("utf-16-le"), "in UTF-16LE"),
        ("a.jsonl", OBJECT.encode("utf-16-be"), "in UTF-16BE"),
        ("a.jsonl", OBJECT.encode("utf-32"), "in UTF-32"),
        ("a.txt", "Plain text.".encode("utf-16"), "in UTF-16"),
        (
            "a.txt",
            "Le café.".encode("latin-1"),
            "probably Latin-1. Convert it: iconv -f CP1252 -t UTF-8 .*a.txt > .*a.utf8.txt",
        ),
        ("a.txt", "“Quoted”.".encode("cp1252"), "not UTF-8, probably cp1252"),
        ("a.txt", OBJECT.encode() * 2, "Rename it to a.jsonl"),
        ("a.txt", b"\xef\xbb\xbf\n" + OBJECT.encode(), "Rename it to a.jsonl"),
        ("a.txt", json.dumps({"body": "a" * 100_000}).encode(), "Rename it to a.jsonl"),
        ("a.txt", json.dumps([{"text": "a"}] * 3, indent=1).encode(), "a JSON array, but a .txt file"),
        ("a.json", json.dumps([{"text": "a"}] * 3, indent=1).encode(), "a JSON array, .* jq -c"),
        ("a.json", json.dumps([{"text": "a"}] * 3).encode(), "a JSON array"),
        (
            "a.jsonl",
            json.dumps({"text": "a", "meta": {"n": 1}}, indent=2).encode(),
            "one JSON object over several lines",
        ),
        ("a.py", b"print 1", "not Python source"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    import re

    assert re.search(why, refused(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.jsonl", "a", "a.JSONL"])
def test_json_lines_are_read_under_any_other_ending(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + OBJECT.encode() * 2)
    assert list(documents(whole(path))) == ["The cat sat."] * 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (
            b'{"content": "a", "id": 7}',
            'no key "text"; the keys are "content", "id"; if all lines are so: jq -c \'{text: .content}\'',
        ),
        (
            b'{"meta": {"text": "a"}, "n": 1}',
            'no key "text"; the keys are "meta", "n"; inside of "meta" there is one; if all lines are so',
        ),
        (b'{"rows": [{"text": "a"}]}', 'no key "text"; the keys are "rows"; inside of "rows" there is one'),
        (b'{"text": "a"},', "a comma after the JSON object"),
        (b'{"text": "a",}', "not JSON: "),
        (b'{"text": ["a", "b"]}', '"text" is an array, and not a string'),
        (b'{"text": null}', '"text" is null, and not a string'),
        (b'["a"]', "an array, and not a JSON object"),
        (b'"a"', "a string, and not a JSON object"),
        (b"The cat sat.", "plain text, and not a JSON object"),
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8, probably Latin-1; the first such byte is 0xE9"),
        ('{"text": "\u201cq\u201d"}'.encode("cp1252"), "not UTF-8, probably cp1252; the first such byte is 0x93"),
        (b"{}", 'no key "text"; the object is empty'),
    ],
)
def test_a_line_says_what_it_is_instead(line: bytes, why: str) -> None:
    text, said = text_of(line)
    assert text is None
    assert said.startswith(why)


def test_at_most_ten_lines_are_named_and_their_cause_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "The cat sat."}\n' * 200)
    bad = [line for line in documents(whole(path)) if isinstance(line, CorruptLine)]
    said = "; ".join(named(bad))
    assert said.count("a.jsonl:") == 10
    assert said.endswith("; and 190 more")
    assert said.count('"content"') == 1
    with pytest.raises(UserError, match=r"data has 200 such lines near its beginning") as caught:
        check(recipes.build("opt-tiny"), 1, data=[str(path)])
    assert str(caught.value).count('"content"') == 1


def test_a_folder_without_json_lines_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz", "notes.md"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"no \*\.jsonl file\. It holds 2 × \.jsonl\.gz, 1 × \.md\."):
        jsonl_files([tmp_path])


@pytest.mark.parametrize(
    ("setting", "suggested"),
    [
        ("lr=3", ["optim.peak_lr"]),
        ("optim.lr=3", ["optim.peak_lr"]),
        ("learning_rate=3", ["optim.peak_lr"]),
        ("batch=8", ["data.global_batch", "data.micro_batch"]),
        ("batch_size=8", ["data.global_batch", "data.micro_batch"]),
        ("dropout=0", ["model.dropout", "model.attention_dropout"]),
        ("warmup=10", ["optim.warmup_steps"]),
        ("wd=0", ["optim.weight_decay"]),
        ("layers=4", ["model.num_layers"]),
        ("heads=4", ["model.num_heads"]),
        ("clip=1", ["optim.clip_norm"]),
        ("seq=128", ["data.seq_len"]),
        ("seqlen=128", ["data.seq_len"]),
        ("LR=3", ["optim.peak_lr"]),
        ("data.microbatch=3", ["data.micro_batch"]),
    ],
)
def test_a_part_of_a_name_finds_the_setting(setting: str, suggested: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipes.build("opt-tiny", [setting])
    said = str(caught.value)
    assert all(name in said for name in suggested), said
    assert said.count(" or ") <= 3


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("" if name == "empty.jsonl" else "\n\n")
    with pytest.raises(UserError, match=rf"{name}.*no text"):
        check(recipes.build("opt-tiny"), 1, data=[str(path)])
