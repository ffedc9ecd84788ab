r"""What deduplication should do, by a comparison of all pairs: written from the definitions of docs/data.md alone.

A word is a maximal run of ``\w``, in lower case. A document is the set of its runs of five words, kept here as tuples
of words; one of fewer words is one run. Nothing here uses the code that is tested, no hash and no estimate.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

Words = tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A document: the file and line as they are told, the line's bytes, the words, and the set of runs."""

    place: str
    line: bytes
    text: str
    words: Words
    runs: frozenset[Words]


@dataclass
class Truth:
    """What is so.

    Attributes:
        documents: of the input, in order of file and line.
        tests: texts that must not be trained on.
        corrupt: places of lines that are no documents.
        pairs: the Jaccard index of each pair of documents that have a run in common, earlier one first.
        with_tests: of each document, the test texts with which it has a run of five words in common, and the index.
        passages: of each document, the test texts with which it has 13 words in a row in common.
    """

    documents: list[Text]
    tests: list[Text]
    corrupt: list[str]
    pairs: dict[tuple[int, int], Fraction] = field(default_factory=dict)
    with_tests: dict[int, dict[int, Fraction]] = field(default_factory=lambda: defaultdict(dict))
    passages: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def contaminated(self, threshold: Fraction) -> set[int]:
        """The documents that share 13 words in a row with a test text, or are a near copy of one."""
        near = {one for one, found in self.with_tests.items() if max(found.values()) >= threshold}
        return near | {one for one, found in self.passages.items() if found}

    def stays(self, threshold: Fraction) -> list[int]:
        """The documents that stay: each is compared with the test texts and with those before it that stay."""
        earlier: dict[int, list[int]] = defaultdict(list)
        for (one, other), index in self.pairs.items():
            if index >= threshold:
                earlier[other].append(one)
        gone = self.contaminated(threshold)
        for number in range(len(self.documents)):
            if number not in gone and any(one not in gone for one in earlier[number]):
                gone.add(number)
        return [number for number in range(len(self.documents)) if number not in gone]


def text_files(folder: Path, inputs: Sequence[str]) -> list[str]:
    """The files of JSON lines among files and folders, in order."""
    found: list[str] = []
    for name in inputs:
        inside = sorted(path.relative_to(folder) for path in (folder / name).rglob("*.jsonl"))
        found += [str(path) for path in inside] if (folder / name).is_dir() else [name]
    return found


def truth(folder: Path, inputs: Sequence[str], tests: Sequence[str]) -> Truth:
    """Read the files and compare all pairs."""
    documents: list[Text] = []
    corrupt: list[str] = []
    for name in text_files(folder, inputs):
        _read(folder, name, documents, corrupt)
    wanted: list[Text] = []
    for name in tests:
        _read(folder, name, wanted, [])
    found = Truth(documents, wanted, corrupt)
    _compare(found)
    return found


def _read(folder: Path, name: str, documents: list[Text], corrupt: list[str]) -> None:
    for number, line in enumerate((folder / name).read_bytes().split(b"\n"), 1):
        place = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
            text = value["text"]
            text.encode()
        except (ValueError, TypeError, KeyError, AttributeError):
            corrupt.append(place)
            continue
        if text.strip():
            words = tuple(word.lower() for word in re.findall(r"\w+", text))
            documents.append(Text(place, line, text.rstrip(), words, _runs(words, 5) or frozenset({words})))


def _runs(words: Words, length: int) -> frozenset[Words]:
    return frozenset(words[begin : begin + length] for begin in range(len(words) - length + 1))


def _compare(found: Truth) -> None:
    having: dict[Words, list[int]] = defaultdict(list)
    for number, document in enumerate(found.documents):
        for one, common in Counter(other for run in document.runs for other in having[run]).items():
            found.pairs[one, number] = _index(found.documents[one], document, common)
        for run in document.runs:
            having[run].append(number)
    for number, test in enumerate(found.tests):
        for one, common in Counter(other for run in test.runs for other in having.get(run, ())).items():
            found.with_tests[one][number] = _index(found.documents[one], test, common)
    tested: dict[Words, set[int]] = defaultdict(set)
    for number, test in enumerate(found.tests):
        for run in _runs(test.words, 13):
            tested[run].add(number)
    for number, document in enumerate(found.documents):
        for run in _runs(document.words, 13):
            found.passages[number] |= tested.get(run, set())


def _index(one: Text, other: Text, common: int) -> Fraction:
    return Fraction(common, len(one.runs) + len(other.runs) - common)
