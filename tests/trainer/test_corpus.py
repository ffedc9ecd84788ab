import errno
import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data import corpus, dataset
from trainer.data.corpus import Corpus, CorruptLine, Span, documents, training_corpora, validation_corpora, whole
from trainer.errors import UserError
from trainer.recipes import opt_tiny

GOOD = [b'{"text": "The cat."}', b'{"text": "The dog.\\n", "id": 7}', b'{"text": ""}', b"", b"  "]
BAD = [b'{"text": "torn', b'{"body": "no text"}', b"[]", b"7", b'{"text": 3}', b'{"text": "\xe9"}', b"[" * 100_000]
LINES = st.lists(st.sampled_from(GOOD + BAD), max_size=30)


def test_what_is_no_document_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD[0], *BAD, GOOD[1]]) + b"\n")
    *_, last = found = list(documents(whole(path)))
    assert found[0] == "The cat."
    assert last == "The dog."
    bad = [line for line in found if isinstance(line, CorruptLine)]
    assert [line.line for line in bad] == list(range(2, len(BAD) + 2))
    convert = "if all lines are so:"
    needed = 'not a JSON object with a string "text" in UTF-8'
    assert (
        str(bad[1]) == f'{path}:3: {needed} (no key "text"; the keys are "body"; {convert} jq -c \'{{text: .body}}\')'
    )
    assert [line.why.partition(" at ")[0] for line in bad] == [
        "not JSON: Unterminated string starting",
        f'no key "text"; the keys are "body"; {convert} jq -c \'{{text: .body}}\'',
        "an array, and not a JSON object",
        "a number, and not a JSON object",
        '"text" is a number, and not a string',
        f"not UTF-8, probably Latin-1; the first such byte is 0xE9; {convert} iconv -f CP1252 -t UTF-8",
        "not JSON: nested too deeply",
    ]


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    half, both = documents(whole(path))
    assert isinstance(half, CorruptLine)
    assert "half of a surrogate pair" in half.why
    assert both == "whole \U0001f600"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=LINES, ends_with_newline=st.booleans(), cuts=st.lists(st.integers(0, 10**5), max_size=5))
def test_wherever_a_file_is_cut_each_line_is_read_once_and_knows_its_number(
    tmp_path: Path, lines: list[bytes], ends_with_newline: bool, cuts: list[int]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends_with_newline)
    size = path.stat().st_size
    ends = [*sorted(cut for cut in cuts if cut < size), size]
    pieces = [Span(path, begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    assert [text for piece in pieces for text in documents(piece)] == list(documents(whole(path)))
    corrupt = [found.line for found in documents(whole(path)) if isinstance(found, CorruptLine)]
    assert corrupt == [number for number, line in enumerate(lines, start=1) if line in BAD]


def test_folders_are_searched_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/a/z.jsonl", "d/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [file.name for file in Corpus(name="d", paths=(tmp_path / "d",)).files()] == ["z.jsonl", "b.jsonl"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.EIO, errno.ESTALE])
def test_data_that_no_node_can_read_is_refused_and_a_fault_of_one_node_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Exit code 78 halts; any other end is tried again, perhaps elsewhere. A folder is not passed over."""
    folder = tmp_path / "d" / "below"
    folder.mkdir(parents=True)
    (tmp_path / "d" / "some.jsonl").write_text('{"text": "words"}\n')
    scan = os.scandir

    def fails(path: str | Path) -> object:
        if Path(path) == folder:
            raise OSError(number, os.strerror(number), str(path))
        return scan(path)

    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "scandir", fails)
    lasting = number in (errno.EACCES, errno.ELOOP)
    with pytest.raises(
        UserError if lasting else OSError, match=f"below.*{os.strerror(number)}" if lasting else "below"
    ):
        dataset.load([f"{tmp_path}/d"], [], None, opt_tiny())


def test_a_link_to_data_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl: No such file"):
        dataset.load([str(tmp_path)], [], None, opt_tiny())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_file_of_the_token_cache_that_cannot_be_read_is_no_fault_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Another host may build the entry again meanwhile: a retry finds it."""
    (tmp_path / "some.jsonl").write_text('{"text": "words"}\n')
    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "cache"))

    def fails(entry: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(entry / "about.json"))

    monkeypatch.setattr(dataset.tokens, "build", fails)
    with pytest.raises(OSError, match=r"about\.json"):
        dataset.load([str(tmp_path / "some.jsonl")], [], None, opt_tiny())


def test_paths_alone_are_one_corpus() -> None:
    assert training_corpora(["a.jsonl", "b"]) == [Corpus(name="data", paths=(Path("a.jsonl"), Path("b")))]
    (built_in,) = training_corpora([])
    assert built_in.sources == ["Python standard library"]


def test_weights_make_corpora_of_their_own() -> None:
    wiki, books = training_corpora(["wiki=text/wiki.jsonl:0.3", "text/books:7"])
    assert wiki == Corpus(name="wiki", paths=(Path("text/wiki.jsonl"),), number=Fraction(3, 10))
    assert books == Corpus(name="books", paths=(Path("text/books"),), number=Fraction(7))


def test_validation_has_an_interval_or_the_recipes() -> None:
    wiki, news = validation_corpora(["wiki=w.jsonl:50", "news.jsonl"])
    assert (wiki.name, wiki.number) == ("wiki", 50)
    assert (news.name, news.number) == ("news", None)


def test_a_name_alone_needs_no_weight() -> None:
    assert training_corpora(["wiki=w/"]) == [Corpus(name="wiki", paths=(Path("w"),), number=Fraction(1))]


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("day=1.jsonl", "x:3"):
        Path(name).write_text("")
    assert training_corpora(["day=1.jsonl", "x:3"])[0].paths == (Path("day=1.jsonl"), Path("x:3"))
    assert training_corpora(["n=x:3:2"]) == [Corpus(name="n", paths=(Path("x:3"),), number=Fraction(2))]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (["a:1", "b"], "--data b: each corpus of a mixture needs a weight above 0, for example b=b:0.3"),
        (["x=a", "y=b"], "--data x=a: each corpus of a mixture needs a weight above 0, for example x=a:0.3"),
        (["x=a:0"], "--data x=a:0: each corpus"),
        (["a:1", "b:0"], "--data b:0: .*above 0"),
        (["u/a.jsonl:1", "v/a.jsonl:1"], r"two corpora have the name a: give one another name: other=v/a\.jsonl"),
    ],
)
def test_a_mixture_that_cannot_be_is_explained(data: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        training_corpora(data)


@pytest.mark.parametrize("valid", ["a:0.5", "a:0"])
def test_an_interval_is_a_whole_number_of_updates(valid: str) -> None:
    with pytest.raises(UserError, match="expected a whole number of updates"):
        validation_corpora([valid])


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "1e9", ""])
def test_what_is_no_weight_is_named(tmp_path: Path, weight: str) -> None:
    with pytest.raises(UserError, match=f"'{weight}' is no weight"):
        training_corpora([f"{tmp_path}:1", f"code={tmp_path}:{weight}"])


def test_missing_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file"):
        Corpus(name="a", paths=(tmp_path / "missing.jsonl",)).files()
    with pytest.raises(UserError, match=r"empty: the folder holds no \*\.jsonl"):
        Corpus(name="a", paths=(tmp_path / "empty",)).files()


def test_the_standard_library_has_prose_enough() -> None:
    files = corpus.standard_library_files()
    assert files == corpus.standard_library_files()
    topics = next(file for file in files if file.parts[-2:] == ("pydoc_data", "topics.py"))
    (prose,) = documents(whole(topics))
    assert isinstance(prose, str)
    assert len(prose) > 400_000
    assert 'The "assert" statement' in prose


def test_lines_may_have_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": 1, "meta": {"text": "no"}, "text": " leading blanks stay \t\n"}) + "\n")
    assert list(documents(whole(path))) == [" leading blanks stay"]
