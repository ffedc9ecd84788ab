"""Deduplication of text that nobody expects, by both engines: each finds what a comparison of all pairs finds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trainer.data.corpus import Document, located, whole
from trainer.data.dedup import processes
from trainer.data.dedup import run as runs
from trainer.data.dedup.candidates import chained, grouped
from trainer.data.dedup.run import run
from trainer.data.dedup.sketch import Sketches, bands_for
from trainer.data.dedup.words import jaccard, run_set
from trainer.data.dedup.work import Options
from trainer.data.tokens import builder
from trainer.errors import UserError

from .test_dedup import Corpus, bytes_of, removed, write

if TYPE_CHECKING:
    from collections.abc import Sequence

pytest.importorskip("rensa")
pytest.importorskip("datatrove")

import numpy as np

ENGINES = ["rensa", "datatrove"]


def hostile(folder: Path) -> Path:
    """Two files with one of everything."""
    random_ = random.Random(3)
    page = " ".join(f"p{random_.randrange(500)}" for _ in range(60))
    near = [page.split() for _ in range(40)]
    for copy in near:
        copy[random_.randrange(60)] = f"n{random_.randrange(10**6)}"
    chain = [f"c{number}" for number in range(80)]
    texts = [
        "Grüße aus Köln, und ein Text in NFC der lang genug ist",
        unicodedata.normalize("NFD", "Grüße aus Köln, und ein Text in NFC der lang genug ist"),
        "İSTANBUL ΟΔΟΣ is lower-cased word by word",
        "i\u0307stanbul οδος is lower-cased word by word",
        *(
            "one",
            "One!",
            "two words",
            "TWO  words.",
            "four words are few",
            "...",
            "!!! ???",
            "a b c d e",
            "A, b. c d e",
        ),
        "again and again and again and again and again and again",
        "again and again and again and again and again and again and again and again",  # the same set, other words
        *([page] * 150),
        *(" ".join(copy) for copy in near),
        *(" ".join([*(f"d{number}" for number in range(step)), *chain[step:]]) for step in range(0, 60, 2)),
        *(text for _, text in Corpus(11).families(12).documents),
        "x" * 300_000 + " a very long word",
        " ".join(f"y{number % 977}z{number}" for number in range(40_000)),
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0).encode() for number, text in enumerate(texts)]
    lines[3:3] = [
        b"",
        b"   ",
        b'{"text": ""}',
        b'{"text": " \\n "}',
        b'{"text": "\xff broken"}',
        b'{"text": "half \\ud83d"}',
    ]
    lines[20:20] = [b"[1]", b"null", b'{"body": "no text"}', b'{"text": 7}', b"[" * 100_000]
    first = [(line + (b"\r\n" if number % 3 == 0 else b"\n")) for number, line in enumerate(lines[:150])]
    folder.mkdir(parents=True)
    (folder / "empty.jsonl").touch()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(first))
    (folder / "b.jsonl").write_bytes(b"\n".join(lines[150:]))  # the last line has no end
    (folder / "c.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "packed.jsonl.gz").write_bytes(b"training does not read it")
    return folder


def expected(paths: Sequence[Path], threshold: float) -> list[bytes]:
    """The lines that stay, by a comparison of each document with all that stay."""
    kept: list[Any] = []
    lines: list[bytes] = []
    for path in paths:
        raw = path.read_bytes()
        for each in located(whole(path)):
            if isinstance(each, Document):
                found = run_set(each.text)
                if not any(jaccard(found, other) >= threshold for other in kept):
                    kept.append(found)
                    lines.append(raw[each.offset :].partition(b"\n")[0] + b"\n")
    return lines


@pytest.fixture(scope="module", params=[0.95, 0.5, 1.0])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, Path]:
    """The hostile corpus, a threshold, and what rensa makes of them."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile(folder / "in")
    run(Options(inputs=(folder / "in",), out=folder / "rensa", threshold=request.param))
    return folder, request.param, folder / "rensa"


def test_what_stays_is_what_a_comparison_of_all_pairs_leaves(odd: tuple[Path, float, Path]):
    folder, threshold, clean = odd
    names = ["a.jsonl", "b.jsonl", "c.jsonl", "empty.jsonl"]
    assert sorted(path.name for path in clean.glob("*.jsonl")) == names
    kept = b"".join((clean / name).read_bytes() for name in names)
    assert kept == b"".join(expected([folder / "in" / name for name in names], threshold))
    assert (clean / "c.jsonl").read_bytes() == b"", "a link is a file of its own: all of it is a copy"
    report = json.loads((clean / "dedup.json").read_text())
    assert report["documents_in"] == report["documents_out"] + sum(report["removed"].values())
    assert report["removed"]["corrupt"] == 2 * 7, "of a.jsonl, and again of the link to it"
    assert kept.count("aus Köln".encode()) + kept.count(b"K\\u00f6ln") == 1, "NFC"
    assert "Ko\u0308ln".encode() in kept or b"Ko\\u0308ln" in kept, "NFD is another text"


def test_datatrove_finds_the_same(odd: tuple[Path, float, Path], monkeypatch: pytest.MonkeyPatch):
    folder, threshold, clean = odd
    if threshold == 1.0:
        pytest.skip("nothing in it is the engine's that 0.95 does not have")
    monkeypatch.setattr(builder, "PIECE", 400_000)
    run(Options(inputs=(folder / "in",), out=folder / "datatrove", threshold=threshold, engine="datatrove", workers=2))
    ours, theirs = bytes_of(folder / "datatrove"), bytes_of(clean)
    assert json.loads(ours.pop("dedup.json"))["engine"].startswith("datatrove ")
    del theirs["dedup.json"]
    assert ours == theirs


def test_copies_of_one_page_are_not_compared_with_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = " ".join(f"w{number}" for number in range(100))
    near = [page.replace(f"w{number} ", "other ") for number in range(3, 99)]
    texts = [page, *([page.upper()] * 5000), *near]
    compared: list[int] = []
    exactly = runs._Sets.jaccard
    monkeypatch.setattr(runs._Sets, "jaccard", lambda *given: (compared.append(1), exactly(*given))[1])
    run(Options(inputs=(write(tmp_path / "a.jsonl", texts),), out=tmp_path / "out", threshold=0.9))
    assert len(removed(tmp_path / "out")) == 5096
    assert len(compared) == 96, "each near copy with the first page alone"


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.9, 0.95, 1.0])
def test_bands_miss_fewer_than_one_in_ten_thousand_at_the_threshold(threshold: float):
    bands = bands_for(threshold)
    assert (1 - threshold ** (128 // bands)) ** bands < 1e-4
    assert (bands_for(0.95), bands_for(0.5)) == (16, 64)


def test_groups_of_bands_and_of_links_are_the_same_documents():
    bands = np.array([[1, 9], [2, 9], [1, 8], [1, 7], [3, 7], [2, 6]], np.uint64)
    one = grouped(bands)
    two = chained([lambda: (np.array([1, 0, 2]), np.array([5, 2, 3])), lambda: (np.array([3, 0]), np.array([4, 1]))])
    for found in (one, two):
        assert found.numbers.tolist() == [0, 1, 2, 3, 4, 5]
        parts = [{tuple(np.flatnonzero(band == group)) for group in set(band) - {-1}} for band in found.of_band.T]
        assert parts == [{(0, 2, 3), (1, 5)}, {(0, 1), (3, 4)}]
    assert chained([lambda: (np.zeros(0, np.int64), np.zeros(0, np.int64))]).numbers.tolist() == []


def test_many_corrupt_lines_are_kept_in_as_many_bytes_as_they_have(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"t": 1}\n' * 3000 + b'{"' + b"long" * 5000 + b'": 1}\n' + b'{"text": "stays"}\n')
    report = run(Options(inputs=(path,), out=tmp_path / "out"))
    assert (report["removed"]["corrupt"], report["documents_out"]) == (3001, 1)
    spans = builder.cut([path])[0]
    saved = tmp_path / "a.npz"
    runs.sketch(spans, runs.NO_RUNS, 1, 16).save(saved)
    assert saved.stat().st_size < 1_000_000
    assert len(Sketches.read(saved).corrupt) == 3001


def test_a_name_that_is_not_utf_8_is_written_as_json(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl"))
    write(path, ["one text", "One text"])
    run(Options(inputs=(path,), out=tmp_path / "out"))
    assert removed(tmp_path / "out")[0]["document"] == f"{path}:2"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "a.jsonl"], "named twice"),
        (["in", "in/sub"], "named twice"),
        (["a.jsonl", "in/sub/../../a.jsonl"], "named twice"),
        (["dedup.json"], "written as well"),
        (["a.txt"], "not JSON lines"),
        (["a.jsonl.gz"], "gunzip -c"),
        (["wide.jsonl"], "UTF-16"),
        (["a.jsonl", "in/sub/a.jsonl"], "would both become"),
        (["nothing"], "holds no"),
        (["."], "is in ., which is read"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], said: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "in/sub/a.jsonl", "dedup.json", "a.txt"):
        write(tmp_path / name, ["a text"])
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08 packed")
    (tmp_path / "wide.jsonl").write_text('{"text": "a text"}\n', encoding="utf-16")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=said):
        run(Options(inputs=tuple(Path(name) for name in names), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_changes_meanwhile_is_no_result(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ["a text", "another text"])

    def changes(_: str) -> None:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match="changed while they were read"):
        run(Options(inputs=(path,), out=tmp_path / "out"), changes)
    assert not (tmp_path / "out").exists()
    assert run(Options(inputs=(path,), out=tmp_path / "out"))["documents_in"] > 2


def test_what_somebody_has_put_into_the_folder_of_the_unfinished_run_stays(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", ["a text"])
    mine = write(tmp_path / "out.part/mine/b.jsonl", ["valuable"])
    stale = tmp_path / "out.part/0123456789abcdef/a.npz"
    stale.parent.mkdir()
    stale.touch()
    run(Options(inputs=(path,), out=tmp_path / "out"))
    assert [path for path in (tmp_path / "out.part").rglob("*") if path.is_file()] == [mine]


def _fails(number: int, finished: Path) -> None:
    if number == 0:
        raise UserError("the first piece is no text")
    time.sleep(60)
    finished.touch()


def test_an_error_of_one_piece_does_not_wait_for_the_others(tmp_path: Path):
    finished = tmp_path / "finished"
    with pytest.raises(UserError, match="the first piece"):
        processes.run_all(_fails, lambda: [(number, finished) for number in range(4)], 2, lambda _: None)
    assert not finished.exists()


@pytest.mark.parametrize("error", [BrokenPipeError, EOFError])
def test_if_the_process_that_starts_others_is_killed_the_pieces_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
):
    submit, killed = processes.ProcessPoolExecutor.submit, [error(), error()]

    def broken(pool: Any, *arguments: Any) -> Any:
        if killed:
            raise killed.pop()
        return submit(pool, *arguments)

    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", broken)
    finished, told = tmp_path / "finished", []
    processes.run_all(Path.touch, lambda: [] if finished.exists() else [(finished,)], 1, told.append)
    assert finished.exists()
    assert told == ["a process was killed: its pieces are done again"] * 2 + ["1 of 1 pieces"]
    killed += [error() for _ in range(processes.ATTEMPTS)]
    with pytest.raises(UserError, match="killed 3 times"):
        processes.run_all(Path.touch, lambda: [(finished,)], 1, told.append)


SMALL_PIECES = """
import sys
from trainer.data.tokens import builder
builder.PIECE = 20_000
from trainer.data.dedup.__main__ import main
sys.exit(main())
"""


def processes_with(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes() and (entry / "stat").read_text().split()[2] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command_interrupted_or_killed_leaves_no_process_and_goes_on(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
):
    texts = [text for _, text in Corpus(7).families(60).documents]
    write(tmp_path / "in/a.jsonl", texts[:100])
    write(tmp_path / "in/b.jsonl", texts[100:])
    monkeypatch.setattr(builder, "PIECE", 50_000)
    monkeypatch.chdir(tmp_path)
    run(Options(inputs=(Path("in"),), out=Path("expected")))
    mark = f"DEDUP_TEST={tmp_path}"
    command = [sys.executable, "-c", SMALL_PIECES, "in", "--out", "out", "--engine", engine, "--workers", "3"]
    place = Path(runs.__file__).parents[3]
    environment = {**os.environ, "DEDUP_TEST": str(tmp_path), "PYTHONPATH": str(place)}
    for wanted, how in ((1, signal.SIGINT), (3, signal.SIGKILL)):
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while child.poll() is None and len(list(Path().glob("out.part/*/*.npz"))) <= wanted:  # one is of the tests
            time.sleep(0.01)
        child.send_signal(how)
        said = child.communicate()[1]
        assert "Traceback" not in said
        assert child.returncode in (-signal.SIGKILL, 130)
        while processes_with(mark):
            time.sleep(0.05)
    assert not Path("out").exists()
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    ours, theirs = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "expected")
    assert {name: raw for name, raw in ours.items() if name != "dedup.json"} == {
        name: raw for name, raw in theirs.items() if name != "dedup.json"
    }


def test_the_command_names_what_is_missing_or_wrong(tmp_path: Path):
    write(tmp_path / "a.jsonl", ["one text", "another text"])
    without = tmp_path / "without.py"
    without.write_text(
        "import sys, importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('datatrove', 'rensa') else real(name, *rest)\n"
        "from trainer.data.dedup.__main__ import main\n"
        "sys.exit(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[3]), "SLURM_CONF": "/nowhere/slurm.conf"}

    def command(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    for engine, extra in (("datatrove", "data-cluster"), ("rensa", "data")):
        code, said = command(str(without), "a.jsonl", "--out", "out", "--engine", engine)
        assert (code, f"-m pip install 'opt-ops[{extra}]'" in said) == (2, True), said
    dedup = ("-m", "trainer.data.dedup", "a.jsonl", "--out", "out")
    for arguments, wanted in (
        (["--slurm", "partition=main,time=10"], "needs --engine datatrove"),
        (["--engine", "datatrove", "--slurm", "partition=main,time=10", "array=1-3"], "array is set"),
        (["--engine", "datatrove", "--slurm", "main"], "expected KEY=VALUE"),
        (["--engine", "datatrove", "--slurm"], "squeue failed"),
        (["--threshold", "0.05"], "at least 0.1"),
        (["--seed", "-1"], "--seed -1"),
    ):
        code, said = command(*dedup, *arguments)
        assert (code, wanted in said, "Traceback" in said) == (78, True, False), said
    assert not (tmp_path / "out").exists()
