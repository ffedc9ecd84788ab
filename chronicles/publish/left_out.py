"""What people and programs wrote: notes, reasons and lines of logs. They are left out, and their copies with them.

So are the fixed prompts and their completions: a site chooses its prompts, and a model repeats what it was trained on.

The daemon copies a reason into what follows from it (`why`, `cause`, titles of alerts), often cut short. So a copy is
any piece of such a text that has the first twelve characters of it. A sentence has brackets and quotation marks of
another form than the text it copies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from chronicles.publish.patterns import EXCEPTION
from chronicles.wording import count
from opt_ops.core.failures.families import find

_PIECE = 12  # characters of a text, at least, that make a copy of its beginning,
_RUN = re.compile(r"\d+\.\d\d")  # the name of a run or an attempt begins so
_WORDS = 3  # and words: a line and its cause may begin with the same name
_ALIKE = str.maketrans("{}[]“”", '()()""')
LINES = frozenset({"line", "lines", "error", "log", "tail", "said", "save_error", "first", "newest"})
"""Fields of evidence and of left-out records that hold lines of others' files."""


class LeftOut:
    """The texts that are left out, and what stands in their place."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()  # by sort: notes, reasons, log lines, completions
        self.texts: dict[str, str] = {}  # in one line each → what stands in its place
        self.by_people: set[str] = set()  # those of them that are notes and reasons
        self._beginnings: dict[str, list[str]] = {}
        self._any: re.Pattern[str] | None = None  # that any of the texts may begin in a text

    def take(self, sort: str, text: str) -> str:
        """Leave a text out: what stands in its place."""
        one_line = " ".join(text.split())
        if not one_line:
            return text
        self.found[sort] += 1
        instead = _instead(sort, one_line)
        if sort != "log lines":
            self.by_people.add(one_line)
        if one_line not in self.texts:
            self.texts[one_line] = instead
            self._beginnings.setdefault(one_line[:_PIECE].strip().translate(_ALIKE), []).append(one_line)
            self._any = None
        return instead

    def leave(self, sort: str, texts: Iterable[str]) -> None:
        """Leave texts out that nobody copies: nothing stands in their place. The check at the end looks for them."""
        for text in texts:
            one_line = " ".join(text.split())
            if len(one_line.split()) >= _WORDS:
                self.texts.setdefault(one_line, "")
        self.found[sort] += 1

    def without_copies(self, text: str) -> str:
        """The text without pieces of what is left out."""
        if self._any is None:
            patterns = [*map(_spaced, sorted(self._beginnings, key=len, reverse=True))]
            self._any = re.compile("|".join(patterns) or r"(?!)")
        found = {" ".join(each.split()).translate(_ALIKE) for each in self._any.findall(text)}
        for beginning in sorted(found, key=lambda each: (-len(each), each)):
            for original in self._beginnings.get(beginning, ()):
                text = _without(text, original, self.texts[original])
        return text


def _spaced(text: str) -> str:
    """A pattern for a text in which any white space may stand for a blank, and any bracket for one of its side."""
    pattern = r"\s+".join(map(re.escape, text.translate(_ALIKE).split(" ")))
    return pattern.replace(r"\(", r"[({\[]").replace(r"\)", r"[)}\]]").replace('"', '["“”]')


def _instead(sort: str, text: str) -> str:
    words = count(len(text.split()), "word")
    if sort != "log lines":
        return f"[{sort.rstrip('s')} of {words}, left out]"
    exception, family = EXCEPTION.search(text), find(text)
    kept = [exception[1]] if exception else []
    kept += [family.name.replace("_", " ")] if family else []
    return f"[log line of {words}, left out{': ' if kept else ''}{', '.join(kept)}]"


def _without(text: str, original: str, instead: str) -> str:
    if len(original) < _PIECE:  # it is copied whole, in quotation marks or behind a colon
        quoted = text.replace(f"“{original}”", f"“{instead}”")
        end = f": {original}"
        return f"{quoted[: -len(original)]}{instead}" if quoted.endswith(end) else quoted
    beginning, at = re.compile(_spaced(original[:_PIECE].strip())), 0
    while found := beginning.search(text, at):
        end, whole = _end_of_copy(text, found.end(), original[len(original[:_PIECE].strip()) :])
        if whole or len(text[found.start() : end].split()) >= _WORDS:
            text = f"{text[: found.start()]}{instead}{text[end:]}"
            end = found.start() + len(instead)
        at = end
    return text


def _end_of_copy(text: str, at: int, rest: str) -> tuple[int, bool]:
    """Where a copy ends whose first characters end at `at`, and whether that is all of the original.

    Any white space stands for a blank of the original.
    """
    for letter in rest:
        space = re.compile(r"\s+").match(text, at) if letter == " " else None
        if space is not None:
            at = space.end()
        elif letter != " " and text[at : at + 1].translate(_ALIKE) == letter.translate(_ALIKE):
            at += 1
        else:
            return (at + 1 if text.startswith("…", at) else at), False
    return at, True


def taken(event: Mapping[str, Any], left: LeftOut) -> dict[str, Any]:
    """An event without what people and programs wrote. `event` is as the journal has it."""
    fields = dict(event)
    if fields.get("kind") == "note_added":
        fields["text"] = left.take("notes", str(fields["text"]))
    elif fields.get("kind") == "checkpoint_sampled":
        for each in fields["completions"]:
            left.leave("completions", each.values())
        fields["completions"] = []
    elif (fields.get("author") or fields.get("by")) and isinstance(fields.get("reason"), str) and fields["reason"]:
        fields["reason"] = left.take("reasons", fields["reason"])
    if isinstance(planned := fields.get("planned"), list):
        fields["planned"] = [_planned(each, left) for each in cast("list[dict[str, Any]]", planned)]
    return {key: _lines(key, value, left) for key, value in fields.items()}


def _planned(change: dict[str, Any], left: LeftOut) -> dict[str, Any]:
    """A planned change: what people call it is left out, and what a trainer's configuration calls it stays."""
    by_person = change.get("by") and not _RUN.match(change["by"])
    return change | {"what": left.take("reasons", change["what"])} if by_person and change.get("what") else change


def _lines(key: str, value: Any, left: LeftOut) -> Any:
    if isinstance(value, str):
        return left.take("log lines", value) if key in LINES and " " in value.strip() else value  # a word is a code
    if isinstance(value, dict):
        return {name: _lines(name, item, left) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_lines(key, item, left) for item in cast("list[Any]", value)]
    return value


def telling_words(left: LeftOut) -> Iterator[str]:
    """Words that people wrote and that stand for themselves, as a password does: six characters, letters and others."""
    for text in left.by_people:
        for word in text.split():
            bare = word.strip(".,;:!?()[]{}“”\"'`")
            if len(bare) >= 6 and re.search(r"[A-Za-z]", bare) and re.search(r"[^A-Za-z’'.-]", bare):
                yield bare
