"""A labelled corpus for the acceptance of deduplication: every kind of text and of file that a site may have.

All of it follows from a seed. Nothing here uses the code that is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

_PASSAGE = 60  # words of a test text in the middle of a document
SHARED = (7, 12, 13, 14)  # words in a row that a document has in common with a test text
_WEIRD_LINES = (
    b"",
    b"   \t ",
    b'{"text": ""}',
    b'{"text": " \\n\\t "}',
    b"plain text",
    b'{"text": 7}',
    b'{"body": "no text"}',
    b"null",
    b"[1]",
    b'{"text": "cut off',
    b'{"text": "\xff"}',
    b'{"text": "half \\ud83d"}',
)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A document, the family of copies that it belongs to, and what was planted into it."""

    text: str
    family: str
    planted: str = ""


@dataclass(frozen=True, kw_only=True)
class Made:
    """The corpus on the disk.

    Attributes:
        inputs: what the command is given, relative to the folder.
        tests: files of test texts, as well.
        labels: by text; a text may stand there several times.
    """

    inputs: tuple[str, ...]
    tests: tuple[str, ...]
    labels: dict[str, Labelled]


class Maker:
    """Makes texts from a seed."""

    def __init__(self, seed: int) -> None:
        """``seed``: decides everything."""
        self.random = Random(seed)
        letters = {
            "english": "abcdefghijklmnoprstuvwy",
            "accents": "aàâäbcçdeéèêfghiïlmnñoôöprsßtuùüvœ",
            "cyrillic": "абвгдежзийклмнопрстуфхцчшщыэюя",
            "greek": "αβγδεζηθικλμνξοπρστυφχψωάέή",
            "han": "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学",
            "kana": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
        }
        self._words = {
            name: ["".join(self.random.choices(of, k=self.random.randint(1, 8))) for _ in range(3000)]
            for name, of in letters.items()
        }
        self.documents: list[Labelled] = []

    def words(self, length: int) -> list[str]:
        """Words of one language; in some texts two are mixed."""
        name = self.random.choice(["english"] * 6 + list(self._words))
        pool = self._words[name]
        if self.random.random() < 0.1:
            pool = pool + self._words["english"]
        return self.random.choices(pool, k=length)

    def written(self, words: Sequence[str]) -> str:
        """The words as a text with other letters, punctuation and blanks: an exact copy of any other such text."""
        blanks = self.random.choice(
            [" ", "  ", "\n", ", ", " … ", " — ", "。", " 🎉 ", "\t", "; ", " (", '" ', "\u00a0"]
        )
        case: Callable[[str], str] = self.random.choice([str, str, str, str.upper, str.title])
        text = blanks.join(word if case(word).lower() != word else case(word) for word in words)
        return self.random.choice(["", "", " ", "¡", "«"]) + text + self.random.choice(["", ".", "!!", " \n", " 😀"])

    def add(self, words: Sequence[str], family: str, planted: str = "") -> None:
        """Append a document."""
        self.documents.append(Labelled(text=self.written(words), family=family, planted=planted))

    def near(self, words: list[str], index: float) -> list[str]:
        """A copy with about this Jaccard index: words replaced, put in or left out, far from one another."""
        copy, runs = list(words), max(1, len(words) - 4)
        edits = max(1, round(runs * (1 - index) / (5 * (1 + index))))
        how = self.random.choice(["replace", "replace", "insert", "delete"])
        room = max(1, len(words) // edits)
        for edit in reversed(range(edits)):
            place = min(edit * room + self.random.randrange(room), len(copy) - 1)
            if how == "delete":
                del copy[place]
            else:
                copy[place : place + (how == "replace")] = [f"q{self.random.randrange(10**7)}"]
        if self.random.random() < 0.2:
            copy = copy[1:] if self.random.random() < 0.5 else [*copy, "tail"]
        return copy or ["q"]


def make(seed: int, folder: Path, documents: int) -> Made:
    """Write about so many documents into files of the folder."""
    maker = Maker(seed)
    tests = [maker.words(maker.random.choice([1, 3, 8, 12, 13, 60, 90, 140])) for _ in range(20)]
    tests += [maker.words(maker.random.randint(70, 160)) for _ in range(30)]
    _families(maker, documents // 17)
    _odd(maker)
    _contaminated(maker, tests)
    _templates(maker, documents // 50)
    while len(maker.documents) < documents:
        length = maker.random.choice([maker.random.randint(5, 30), maker.random.randint(30, 300), 600])
        maker.add(maker.words(length), f"lone {len(maker.documents)}")
    maker.random.shuffle(maker.documents)
    _write(maker, folder)
    (folder / "tests").mkdir()
    files = {"tests/questions.jsonl": tests[:25], "tests/valid-text.jsonl": tests[25:]}
    for name, texts in files.items():
        (folder / name).write_text("".join(json.dumps({"text": maker.written(one)}) + "\n" for one in texts))
    return Made(
        inputs=("z-first.jsonl", "folder", "crlf.jsonl", "empty.jsonl"),
        tests=tuple(files),
        labels={each.text.rstrip(): each for each in maker.documents},
    )


def _families(maker: Maker, number: int) -> None:
    indices = (0.80, 0.84, 0.88, 0.91, 0.93, 0.94, 0.95, 0.955, 0.96, 0.97, 0.975, 0.98, 0.985, 0.99, 0.995, 0.999)
    for family in range(number):
        first = maker.words(maker.random.choice([60, 120, 195, 199, 300, 500, 900]))
        maker.add(first, f"family {family}")
        for _ in range(maker.random.randint(0, 3)):
            maker.add(first, f"family {family}")
        for _ in range(maker.random.randint(1, 4)):
            maker.add(maker.near(first, maker.random.choice(indices)), f"family {family}")
    for number_ in range(12):  # J is exactly 0.95: 190 of 200 runs; and one run less, 189 of 199
        for length, name in ((199, "at"), (198, "below")):
            first = maker.words(length)
            maker.add(first, f"{name} {number_}")
            maker.add([*first[:90], f"q{number_}", *first[91:]], f"{name} {number_}")
    for chain in range(4):  # each a near copy of the next one; the ends have little in common
        text = maker.words(300)
        for step in range(25):
            text = [*text[:step], f"step{step}x{chain}", *text[step + 1 :]]
            maker.add(text, f"chain {chain}")
    for book in range(3):
        text = maker.words(maker.random.choice([12_000, 25_000]))
        for copy in (text, text, maker.near(text, 0.999), maker.near(text, 0.96), maker.near(text, 0.9)):
            maker.add(copy, f"book {book}")


def _odd(maker: Maker) -> None:
    """Short texts, texts without a word, and one word again and again: small sets, many equal."""
    for number in range(60):
        words = maker.words(maker.random.randint(1, 4))
        for _ in range(maker.random.randint(1, 3)):
            maker.add(words, f"short {number}")
    for text in ("…", "!!! ???", "😀😀", "—", "。。", "🎉 🎉"):
        maker.documents.append(Labelled(text=text, family="no word"))
    for number in range(8):
        words = maker.words(2)
        for times in (1, 2, 3, 10, 40):
            maker.add(words * times, f"again {number} {min(times, 3)}")
    maker.documents += [
        Labelled(text="Café au lait, très bon pour le matin", family="NFC"),
        Labelled(text="Cafe\u0301 au lait, tre\u0300s bon pour le matin", family="NFD"),
        Labelled(text="İSTANBUL ΟΔΟΣ STRASSE and some more words", family="case"),
        Labelled(text="i\u0307stanbul οδος strasse AND SOME MORE WORDS", family="case"),
        Labelled(text="x" * 200_000 + " one very long word and few others", family="long word"),
    ]


def _contaminated(maker: Maker, tests: Sequence[list[str]]) -> None:
    for number, test in enumerate(tests):
        maker.add(test, f"test {number}", "copy")
        if len(test) > 2 * _PASSAGE // 2 + 10:
            maker.add(maker.near(test, 0.97), f"test {number}", "near")
            begin = maker.random.randrange(len(test) - _PASSAGE)
            _planted(maker, test[begin : begin + _PASSAGE], f"passage {number}", "passage")
        for shared in SHARED:
            if len(test) > shared + 1:
                begin = maker.random.randrange(len(test) - shared)
                _planted(maker, test[begin : begin + shared], f"shares {shared} {number}", f"shares {shared}")


def _planted(maker: Maker, words: Sequence[str], family: str, planted: str) -> None:
    """Into the beginning, the middle or the end of a text that has no word of the test beside it."""
    before = [f"b{maker.random.randrange(10**7)}" for _ in range(maker.random.choice([0, 1, 80]))]
    after = [f"a{maker.random.randrange(10**7)}" for _ in range(maker.random.choice([0, 1, 200]))]
    maker.add([*before, *words, *(after or (["end"] if not before else []))], family, planted)


def _templates(maker: Maker, number: int) -> None:
    """Boilerplate with texts of their own: alike, but no copies. And one page that occurs often."""
    for template in range(5):
        page, share = maker.words(200), maker.random.choice([0.3, 0.6, 0.8, 0.9])
        for copy in range(number):
            own = [f"t{template}c{copy}w{word}" for word in range(round(200 * (1 - share)))]
            maker.add([*page[: 100 - len(own) // 2], *own, *page[100:]], f"template {template} {copy}")
    page = maker.words(150)
    for _ in range(2 * number):
        maker.add(page, "page")


def _write(maker: Maker, folder: Path) -> None:
    names = ("z-first.jsonl", "folder/b.jsonl", "folder/deep/er/a.jsonl", "folder/a b ü.jsonl", "crlf.jsonl")
    for number, name in enumerate(names):
        lines: list[bytes] = []
        for each in maker.documents[number :: len(names)]:
            about = {"meta": {"url": f"https://example.org/{len(lines)}"}} if maker.random.random() < 0.3 else {}
            line = json.dumps(about | {"text": each.text}, ensure_ascii=maker.random.random() < 0.5)
            lines.append(line.encode())
            if maker.random.random() < 0.03:
                lines.append(maker.random.choice(_WEIRD_LINES))
        end = b"\r\n" if name.startswith("crlf") else b"\n"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(end.join(lines) + end * maker.random.randint(0, 3))
    (folder / "empty.jsonl").touch()
