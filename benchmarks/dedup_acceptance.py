"""The acceptance of deduplication: the command against a comparison of all pairs, with processes killed meanwhile.

    python -m benchmarks.dedup_acceptance --seeds 1 2 3 --kills 6
    python -m benchmarks.dedup_acceptance --copies 1000000

The first makes a labelled corpus from each seed (`dedup_corpus`), computes what is true of it (`dedup_truth`), and runs
the command of docs/data.md with both engines, one to three processes, and SIGKILL at random moments, of the command and
of its other processes. A result must be that of the comparison, and all results the same bytes. The second runs it on
as many copies of one page among 2,000 other texts and says what it took. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.dedup_corpus import Made, Maker, make
from benchmarks.dedup_truth import Truth, text_files, truth

ENGINES = ("rensa", "datatrove")
THRESHOLD = Fraction(95, 100)
_PIECES_OF = 300_000  # bytes, where processes are killed: the command's own would make one piece of this corpus
_KEYS = (
    *("v", "engine", "threshold", "shingle", "permutations", "bands", "seed", "documents_in", "documents_out"),
    *("removed", "inputs", "against", "digest", "seconds", "contaminated", "against_duplicates"),
)
_SMALL_PIECES = """
import sys
from trainer.data.tokens import builder
builder.PIECE = int(sys.argv.pop(1))
from trainer.data.dedup.__main__ import main
sys.exit(main())
"""


class Case:
    """One corpus, what is true of it, and what the command made of it."""

    def __init__(self, folder: Path, made: Made, true: Truth) -> None:
        """``folder``: of the corpus and of the results."""
        self.folder, self.made, self.true = folder, made, true
        self.stays = true.stays(THRESHOLD)
        self.failures: list[str] = []

    def must(self, holds: bool, what: str) -> None:
        """Note a goal that is missed."""
        if not holds:
            self.failures.append(what)
            print(f"MISSED: {what}", file=sys.stderr, flush=True)

    def start(self, out: str, engine: str, workers: int, pieces_of: int | None = None) -> subprocess.Popen[str]:
        """The command, in the corpus's folder. Its processes are known by a mark in their environment."""
        how = ["-m", "trainer.data.dedup"] if pieces_of is None else ["-c", _SMALL_PIECES, str(pieces_of)]
        command = [sys.executable, *how, *self.made.inputs, "--out", out, "--against", *self.made.tests]
        return subprocess.Popen(
            [*command, "--engine", engine, "--workers", str(workers)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(Path.cwd()), "DEDUP_ACCEPTANCE": str(self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self) -> list[int]:
        """Those that the command has started, and itself."""
        mark, found = f"DEDUP_ACCEPTANCE={self.folder}".encode(), list[int]()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes() and (entry / "stat").read_text().split()[2] != "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def finish(self, out: str, child: subprocess.Popen[str]) -> None:
        """Wait for the command; it must succeed."""
        said = child.communicate()[1]
        self.must(child.returncode == 0, f"{out}: exit code {child.returncode}: {said[-400:]}")

    def bytes_of(self, out: str) -> dict[str, bytes]:
        """The result, without the engine and the seconds."""
        folder = self.folder / out
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        report = json.loads(found.get("dedup.json", b"{}"))
        report.update(engine="", seconds=0)
        return found | {"dedup.json": json.dumps(report).encode()}


def check_kept(case: Case, out: str) -> dict[str, Any]:
    """The lines that stay against the truth; the figures of the goals."""
    true, documents = case.true, case.true.documents
    kept: set[int] = set()
    for name in text_files(case.folder, case.made.inputs):
        own = [number for number, each in enumerate(documents) if each.place.rpartition(":")[0] == name]
        found = _written(case, out, name)
        case.must(
            found == b"".join(documents[number].line + b"\n" for number in own if number in set(case.stays)),
            f"{out}: {name} is not what the comparison of all pairs leaves",
        )
        left = found.split(b"\n")[::-1]
        for number in own:
            if documents[number].line == left[-1]:
                kept.add(number)
                left.pop()
        case.must(left == [b""], f"{out}: {name} has lines that are none of the input's, or in another order")
    contaminated = true.contaminated(THRESHOLD)
    near = [pair for pair, index in true.pairs.items() if index >= Fraction(97, 100)]
    both = sum(one in kept and other in kept for one, other in near)
    case.must(both <= len(near) / 100, f"{out}: both kept of {both} of {len(near)} pairs at J >= 0.97")
    alike = {number for pair, index in true.pairs.items() if index > Fraction(85, 100) for number in pair}
    distinct = set(range(len(documents))) - alike - contaminated
    case.must(len(distinct - kept) <= len(distinct) / 1000, f"{out}: {len(distinct - kept)} distinct documents went")
    families: dict[str, list[int]] = defaultdict(list)
    for number, each in enumerate(documents):
        if number not in contaminated:
            families[case.made.labels[each.text].family].append(number)
    lost = [name for name, members in families.items() if not kept.intersection(members)]
    # a family of another name may have the same words: short texts
    lost = [name for name in lost if not _copied(case, families[name], kept)]
    case.must(not lost, f"{out}: families that lost their last document: {lost[:5]}")
    planted = {number: case.made.labels[each.text].planted for number, each in enumerate(documents)}
    wrong = [each for each in planted if planted[each] in ("copy", "passage", "shares 13") and each in kept]
    wrong += [each for each in planted if planted[each] in ("shares 7", "shares 12") and each not in kept]
    case.must(not wrong, f"{out}: planted texts with another fate: {[planted[each] for each in wrong[:5]]}")
    return {
        "pairs": len(near),
        "recall": f"{1 - both / len(near):.2%}",
        "lost": f"{len(distinct - kept)} of {len(distinct):,}",
        "contaminated": len(contaminated),
    }


def _written(case: Case, out: str, name: str) -> bytes:
    """A file of the result. Those of a folder are named from that folder on."""
    return (case.folder / out / name.removeprefix("folder/")).read_bytes()


def _copied(case: Case, members: list[int], kept: set[int]) -> bool:
    words = {case.true.documents[number].words for number in kept}
    return all(case.true.documents[number].words in words for number in members)


def _rows(case: Case, out: str) -> list[dict[str, Any]]:
    with gzip.open(case.folder / out / "removed.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def check_removed(case: Case, out: str) -> None:
    """removed.jsonl.gz: a row for each line that went, with its reason, what it is like, and how much."""
    true, documents = case.true, case.true.documents
    numbers = {each.place: number for number, each in enumerate(documents)}
    tests = {each.place: number for number, each in enumerate(true.tests)}
    stays, contaminated = set(case.stays), true.contaminated(THRESHOLD)
    rows = _rows(case, out)
    told = [row["document"] for row in rows]
    case.must(
        told == [each.place for number, each in enumerate(documents) if number not in stays] + true.corrupt,
        f"{out}: removed.jsonl.gz names other documents than those that went",
    )
    for row in rows:
        number, other = numbers.get(row["document"]), row["kept"]
        if row["why"] == "corrupt" or number is None:
            case.must(row["document"] in true.corrupt and other is None and "cause" in row, f"{out}: {row}")
            continue
        if row["why"] == "contaminated":
            right = number in contaminated and other in tests
            words, index = row.get("words"), row.get("jaccard")
            right &= (words == 13) == (tests.get(other) in true.passages[number]) and (words is None) != (index is None)
            exact = true.with_tests[number].get(tests.get(other, -1))
        else:
            kept = numbers.get(other, -1)
            exact = true.pairs.get((kept, number))
            same = documents[kept].words == documents[number].words
            right = kept in stays and number not in contaminated and row["why"] == ("exact" if same else "near")
        if "jaccard" in row:
            right &= exact is not None and exact >= THRESHOLD and row["jaccard"] == round(float(exact), 6)
        case.must(right, f"{out}: wrong row {row}")


def check_report(case: Case, out: str, engine: str) -> None:
    """dedup.json, as docs/data.md and docs/formats.md have it."""
    report = json.loads((case.folder / out / "dedup.json").read_text())
    case.must(sorted(report) == sorted(_KEYS), f"{out}: dedup.json has the keys {sorted(report)}")
    whys = [row["why"] for row in _rows(case, out)]
    texts = text_files(case.folder, case.made.inputs)
    lines = b"".join(_written(case, out, name) for name in texts)
    wanted = {
        "v": 1,
        "threshold": 0.95,
        "shingle": "5 words",
        "permutations": 128,
        "bands": 16,
        "seed": 1,
        "documents_in": len(case.true.documents) + len(case.true.corrupt),
        "documents_out": len(case.stays),
        "removed": {why: whys.count(why) for why in ("exact", "near", "contaminated", "corrupt")},
        "inputs": [_file(case.folder, name) for name in texts],
        "against": [_file(case.folder, name) for name in case.made.tests],
        "against_duplicates": [],
        "digest": f"sha256:{hashlib.sha256(lines).hexdigest()}",
    }
    for name, value in wanted.items():
        case.must(report[name] == value, f"{out}: dedup.json has {name} {report[name]}, and not {value}")
    case.must(report["engine"].startswith(f"{engine} "), f"{out}: engine {report['engine']}")
    by_test = sum(report["contaminated"].values())
    case.must(by_test == whys.count("contaminated"), f"{out}: contaminated by test text: {report['contaminated']}")


def _file(folder: Path, name: str) -> dict[str, str]:
    return {"path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def check_kills(case: Case, engine: str, kills: int, chosen: Random, expected: dict[str, bytes]) -> None:
    """Kill other processes of the command, and then the command itself, at random moments, and while it writes."""
    began = time.monotonic()
    case.finish(f"{engine}-pieces", case.start(f"{engine}-pieces", engine, 3, _PIECES_OF))
    usual = time.monotonic() - began
    case.must(case.bytes_of(f"{engine}-pieces") == expected, f"{engine}: other bytes with small pieces")
    for number in range(kills):
        out = f"{engine}-worker-{number}"
        child = case.start(out, engine, 3, _PIECES_OF)
        _wait(child, chosen.uniform(0, usual))
        while child.poll() is None and not (others := [pid for pid in case.processes() if pid != child.pid]):
            time.sleep(0.01)
        if child.poll() is None:
            _kill(chosen.choice(others))
        case.finish(out, child)
        case.must(case.bytes_of(out) == expected, f"{out}: other bytes after a process was killed")
    for number in range(kills):
        out = f"{engine}-command-{number}"
        while not (case.folder / out).exists():
            child = case.start(out, engine, 3, _PIECES_OF)
            if number % 3 == 0:  # while the result is written
                while child.poll() is None and not list(case.folder.glob(f"{out}.part/*/out")):
                    time.sleep(0.002)
            else:
                _wait(child, chosen.uniform(0, usual))
            _kill(child.pid)
            child.communicate()
            while case.processes():  # they end by themselves
                time.sleep(0.05)
            if not (case.folder / out).exists() and chosen.random() < 0.7:
                case.finish(out, case.start(out, engine, chosen.randint(1, 3), _PIECES_OF))
                case.must(not (case.folder / f"{out}.part").exists(), f"{out}: its .part is left")
        case.must(case.bytes_of(out) == expected, f"{out}: other bytes after the command was killed")


def _wait(child: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def check_refusals(case: Case, engine: str) -> None:
    """A folder that exists, a file of that name, and a link that leads nowhere: exit code 78, and nothing changes."""
    (case.folder / "there").mkdir(exist_ok=True)
    (case.folder / "file").write_text("mine")
    (case.folder / "link").unlink(missing_ok=True)
    (case.folder / "link").symlink_to("nowhere")
    for name in ("there", "file", "link", engine):
        child = case.start(name, engine, 1)
        said = child.communicate()[1]
        case.must(child.returncode == 78, f"--out {name} that exists: exit code {child.returncode}: {said[-300:]}")
        case.must(not (case.folder / f"{name}.part").exists(), f"--out {name}: {name}.part is left")
    untouched = not any((case.folder / "there").iterdir()) and (case.folder / "file").read_text() == "mine"
    case.must(untouched and (case.folder / "link").is_symlink(), "a folder, file or link that existed was changed")


def accept(seed: int, documents: int, kills: int) -> list[str]:
    """Make the corpus of a seed and hold the command to it; what was missed."""
    with tempfile.TemporaryDirectory() as made:
        folder, chosen = Path(made), Random(seed)
        corpus = make(seed, folder, documents)
        case = Case(folder, corpus, truth(folder, corpus.inputs, corpus.tests))
        expected: dict[str, bytes] = {}
        for engine in ENGINES:
            case.finish(engine, case.start(engine, engine, 1))
            figures = check_kept(case, engine)
            check_removed(case, engine)
            check_report(case, engine, engine)
            expected = expected or case.bytes_of(engine)
            for workers in (1, 2, 3):
                out = f"{engine}-{workers}"
                case.finish(out, case.start(out, engine, workers, _PIECES_OF if workers > 1 else None))
                case.must(case.bytes_of(out) == expected, f"{out}: other bytes than rensa with one process")
            check_kills(case, engine, kills, chosen, expected)
            check_refusals(case, engine)
            row = (seed, engine, f"{len(case.true.documents):,}", *figures.values(), len(case.failures))
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        return case.failures


def copies(number: int, engine: str) -> None:
    """One page very often among 2,000 other texts: what it takes, and that one copy stays."""
    maker = Maker(1)
    page = maker.words(60)
    others = [maker.written(maker.words(200)) for _ in range(2000)]
    with tempfile.TemporaryDirectory() as made:
        path = Path(made, "in.jsonl")
        lines = [json.dumps({"text": text}) + "\n" for text in others]
        forms = [json.dumps({"text": maker.written(page)}) + "\n" for _ in range(20)]
        with path.open("w") as file:
            for copy in range(number):
                file.write(forms[copy % len(forms)])
                file.writelines(lines[copy * len(lines) // number : (copy + 1) * len(lines) // number])
        began = time.monotonic()
        command = [sys.executable, "-m", "trainer.data.dedup", str(path), "--out", f"{made}/out", "--workers", "2"]
        subprocess.run([*command, "--engine", engine], check=True, capture_output=True)
        seconds = time.monotonic() - began
        report = json.loads(Path(made, "out/dedup.json").read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"{engine}: {path.stat().st_size / 1e6:.0f} MB, {number:,} copies: {seconds:.0f} s, {peak:.0f} MiB, ",
            end="",
        )
        print(
            f"{report['documents_out']:,} of {report['documents_in']:,} documents stay; load {os.getloadavg()[0]:.0f}"
        )
        if report["documents_out"] != 2001:
            raise SystemExit("MISSED: 2,001 documents were to stay")


def main() -> None:
    """Run it, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--documents", type=int, default=2500)
    parser.add_argument("--kills", type=int, default=6, help="of the command, and as many of its other processes")
    parser.add_argument("--copies", type=int, help="copies of one page, and nothing else")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="for --copies")
    given = parser.parse_args()
    if given.copies:
        for engine in given.engines:
            copies(given.copies, engine)
        return
    print("| seed | engine | documents | pairs at J ≥ 0.97 | recall | distinct that went | contaminated | missed |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    missed = [accept(seed, given.documents, given.kills) for seed in given.seeds]
    if any(missed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
