"""The last check before files leave: every original is searched for in what was written, in each way of writing it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from chronicles.logbook import drawing
from chronicles.publish.names import alone, is_number
from chronicles.publish.patterns import own_names

_TEMPLATES = Path(drawing.__path__[0]) / "templates"
_SHORT = 5  # characters: shorter originals are searched as whole words
_PART = re.compile(r"[a-z0-9]+")
_OF_JOBS = re.compile(r"\bjobs?\b[^\n]{0,80}")
_JOBS, _NODES = frozenset({"job", "jobs"}), frozenset({"node", "nodes", "exclude", "excluded", "host"})
_OF_NODES = re.compile(r"\b(?:node|host|excluded node) (\d+)(?![\w-]|[.,]\d)(?! of\b)")
_JOB = re.compile(r"(?<![\w.,-])[\w+.-]*[\w](?![.,]\d)")


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
    files: Iterable[Path], originals: Mapping[str, Iterable[str]], names: re.Pattern[str], lineage: str
) -> Iterator[Leak]:
    """Every original that is found in the files, by sort; they are read as bytes that a stranger would read.

    Args:
        files: What was written.
        originals: By sort, what must not be in them.
        names: What stands in the place of originals, in lower case: it is no leak.
        lineage: Its own names are no leak.
    """
    ours = re.compile(f"{own_names(lineage)}|{names.pattern}")
    known = [(sort, each) for sort, found in originals.items() for each in dict.fromkeys(found) if each]
    for file in files:
        written = _Written(file.suffix, file.read_text(encoding="utf-8"), ours)
        for sort, original in known:
            if written.has_sort(sort, original):
                yield Leak(file=file.name, line=written.line(original), sort=sort, original=original)


class _Written:
    """A file as it can be read, in lower case: as it stands, without markup, without escapes."""

    def __init__(self, suffix: str, text: str, ours: re.Pattern[str]) -> None:
        self._text, self._ours = text, ours
        self._readings = [each.lower() for each in _readings(suffix, text)]
        self._jobs = _jobs_in(suffix, text)
        self._nodes = _nodes_in(suffix, text, self._readings)

    @cached_property
    def _whole(self) -> list[str]:
        """With the markup: it has words of ours, but no name in it may be another's."""
        return list(dict.fromkeys([*self._readings, self._text.lower()]))

    @cached_property
    def _parts(self) -> set[str]:
        """Every run of letters and digits."""
        return {part for text in self._whole for part in _PART.findall(text)}

    @cached_property
    def _words(self) -> list[str]:
        """Without markup and without names of ours, for names that may be a part of others."""
        return [self._ours.sub("\0", text) for text in self._readings]

    @cached_property
    def _word_parts(self) -> set[str]:
        return {part for text in self._words for part in _PART.findall(text)}

    def has(self, original: str) -> bool:
        """Whether it stands anywhere. A short name must stand alone; others count as a part of a longer one, too."""
        low = " ".join(original.lower().split())
        if len(low) < _SHORT or low.isalpha() or low.isdigit():
            if low.isascii() and low.isalnum():
                return low in self._word_parts
            pattern = re.compile(alone(re.escape(low)))
            return any(low in text and pattern.search(text) for text in self._words)
        inner = _PART.findall(low)[1:-1]
        if not self._parts.issuperset(inner):
            return False
        return any(low in text for text in (self._words if low.isalnum() else self._whole))

    def has_sort(self, sort: str, original: str) -> bool:
        """Whether it stands anywhere. Numbers of jobs and nodes: whether they stand where the file speaks of those."""
        low = original.lower()
        if sort == "jobs":
            return low in self._jobs or (not low.isdigit() and self.has(original))
        if sort in ("nodes", "hosts") and is_number(low):
            return low in self._nodes
        return self.has(original)

    def line(self, original: str) -> int:
        """Where it stands in the file as it is; 0: nowhere."""
        at = self._text.lower().find(original.lower())
        return self._text.count("\n", 0, at) + 1 if at >= 0 else 0


def _jobs_in(suffix: str, text: str) -> set[str]:
    """What may be the name of a job."""
    found = {job for part in _OF_JOBS.findall(text.lower()) for job in _JOB.findall(part)}
    if suffix == ".json":
        found |= {job.lower() for job in _under(json.loads(text), _JOBS)}
    return found


def _nodes_in(suffix: str, text: str, readings: Iterable[str]) -> set[str]:
    """What may be a node that is called by a number."""
    found = {number for each in readings for part in _OF_NODES.findall(each) for number in re.findall(r"\d+", part)}
    if suffix == ".json":
        found |= set(_under(json.loads(text), _NODES))
    return found


def _under(value: Any, keys: frozenset[str], within: bool = False) -> Iterator[str]:
    """The texts that stand under one of these keys."""
    if isinstance(value, str) and within:
        yield value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            yield from _under(item, keys, key in keys)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _under(item, keys, within)


def _readings(suffix: str, text: str) -> Iterator[str]:
    """A file's text in each way that shows something."""
    if suffix == ".json":
        yield "\n".join(_strings(json.loads(text)))
    elif suffix == ".html":
        page = _Page(text)
        yield "\n".join(page.texts)
        for data in page.data:
            yield "\n".join(_strings(json.loads(data)))
    else:
        plain = re.sub(r"\\(.)", r"\1", html.unescape(text))
        yield text
        yield from (each for each in (plain, unquote(plain)) if each != text)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from dict.fromkeys((" ".join(value.split()), unquote(value)))
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
        self.texts += [part for value in shown for part in dict.fromkeys((value, unquote(value)))]

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
    known = (
        path.read_text(encoding="utf-8").strip()
        for path in sorted(_TEMPLATES.iterdir())
        if path.suffix in (".css", ".js")
    )
    return code.strip() in known
