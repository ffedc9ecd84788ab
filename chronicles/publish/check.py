"""The last check before files leave: every original is searched for in what was written, in each way of writing it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from chronicles.logbook import drawing
from chronicles.publish.names import alone
from chronicles.publish.patterns import own_names

_TEMPLATES = Path(drawing.__path__[0]) / "templates"
_SHORT = 5  # characters: shorter originals are searched as whole words
_JOB = r"\bjobs?\b[^\n]{0,80}?(?<![\w.,-])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """An original that stands in a written file; line 0: only once its escapes are read."""

    file: str
    line: int
    sort: str
    original: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.sort}: {self.original}"


def leaks(
    files: Iterable[Path], originals: Mapping[str, Iterable[str]], placeholders: Iterable[str], lineage: str
) -> Iterator[Leak]:
    """Every original that is found in the files, by sort; they are read as bytes that a stranger would read.

    Args:
        files: What was written.
        originals: By sort, what must not be in them.
        placeholders: What stands in their place: it is no leak.
        lineage: Its own names are no leak.
    """
    known = {(sort, each): _pattern(sort, each) for sort, found in originals.items() for each in found if each}
    ours = "|".join([own_names(lineage), *map(re.escape, sorted(set(placeholders), key=len, reverse=True))])
    blank = re.compile(ours)
    for file in files:
        raw = file.read_text()
        readings = list(_readings(file.suffix, raw))
        words = [blank.sub("\0", text) for text in readings]
        for (sort, original), pattern in known.items():
            # A short name may be a part of ours, and a word may stand in a style sheet of ours.
            texts = words if _is_short(original) else [*readings, raw]
            if any(pattern.search(text) for text in texts):
                found = pattern.search(raw)
                line = raw.count("\n", 0, found.start()) + 1 if found else 0
                yield Leak(file=file.name, line=line, sort=sort, original=original)


def _is_short(original: str) -> bool:
    return len(original) < _SHORT or original.isalnum()


def _pattern(sort: str, original: str) -> re.Pattern[str]:
    quoted = r"\s+".join(map(re.escape, original.split()))
    if sort == "jobs":
        return re.compile(rf"{_JOB}{quoted}(?![A-Za-z0-9]|[.,]\d)|\"jobs?\": (?:\[[^\]]*)?\"{quoted}\"", re.IGNORECASE)
    if len(original) < _SHORT or original.isalpha() or original.isdigit():
        return re.compile(alone(quoted), re.IGNORECASE if len(original) > 2 else 0)
    return re.compile(quoted, re.IGNORECASE)


def _readings(suffix: str, text: str) -> Iterator[str]:
    """A file's text in each way that shows something: as it stands, without markup, without escapes."""
    if suffix == ".json":
        yield from _of_json(text)
        return
    if suffix == ".html":
        page = _Page(text)
        yield "\n".join(page.texts)
        for data in page.data:
            yield from _of_json(data)
        return
    yield text
    yield re.sub(r"\\(.)", r"\1", html.unescape(text))
    yield unquote(text)


def _of_json(text: str) -> Iterator[str]:
    value = json.loads(text)
    yield json.dumps(value, ensure_ascii=False, indent=0)
    yield "\n".join(_strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _strings(item)


class _Page(HTMLParser):
    """The texts and attributes of a page, comments included, and its JSON data. Styles and scripts of ours are not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.data: list[str] = []
        self._within: str = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag if tag in ("style", "script") else ""
        if tag == "script" and dict(attrs).get("type") == "application/json":
            self._within = "data"
        shown = (value for name, value in attrs if value and name not in ("class", "style", "d", "points"))
        self.texts += [part for value in shown for part in (value, unquote(value))]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("style", "script"):
            self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "data":
            self.data.append(data)
        elif not self._within or not _is_ours(data):
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.texts.append(data)


def _is_ours(code: str) -> bool:
    """Whether it is, to the letter, a style or script that comes with opt-ops."""
    known = (path.read_text().strip() for path in sorted(_TEMPLATES.iterdir()) if path.suffix in (".css", ".js"))
    return code.strip() in known
