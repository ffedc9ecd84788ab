"""The table of replacements: each original has one name, the same in every file and whenever it is published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import PurePosixPath

from chronicles.publish.patterns import NO_ADDRESS, NUMBERED_NODES, PATTERNS, own_names

SCHEMA = "opt-ops/redaction/1"

_STEMS: Mapping[str, tuple[str, ...]] = {
    "nodes": ("node-", "machine-", "computer-"),
    "people": ("person-", "operator-", "colleague-"),
    "jobs": ("job-", "batch-job-", "cluster-job-"),
    "partitions": ("partition-", "part-of-cluster-"),
    "accounts": ("account-", "cluster-account-"),
    "hosts": ("host-", "other-host-"),
    "addresses": ("address-", "network-address-"),
    "pci": ("pci-", "pci-address-"),
    "gpus": ("gpu-", "gpu-part-"),
    "uuids": ("uuid-", "universal-id-"),
    "paths": ("path-", "folder-path-"),
    "emails": ("email-", "email-address-"),
    "urls": ("url-", "web-address-"),
    "environment": ("environment-", "environment-value-"),
    "secrets": ("secret-", "left-out-secret-"),
    "own": ("replaced-",),  # by --replace without a text of its own
}
SORTS = tuple(_STEMS)
_TYPED = ("nodes", "people", "partitions", "accounts", "hosts", "gpus", "environment")
"""Sorts that fields of the journal and the configuration tell of: no pattern finds them in a text."""
_PADDED = {"nodes": 3, "gpus": 3}  # digits
_NUMBERED_NODE = re.compile(r"(.*[A-Za-z].*?)(\d+)")
_SERIAL = 8  # digits: a shorter number is too common to be replaced wherever it stands
_SHORT = 3  # characters: shorter names are only matched in the same case


class Names:
    """Originals by sort, and what replaces them. Texts that are replaced add what their patterns find."""

    def __init__(self, lineage: str, known: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._lineage = lineage
        self.table: dict[str, dict[str, str]] = {sort: dict((known or {}).get(sort, {})) for sort in SORTS}
        self.used: dict[str, set[str]] = {sort: set() for sort in SORTS}  # by sort: names that were given
        self.kept: set[str] = set()
        self._same: dict[str, str] = {}  # in lower case: every original and its replacement
        self._sorts: dict[str, str] = {}  # by name: the sort that it belongs to
        for sort, names in self.table.items():
            self._same |= {_same_as(sort, original): name for original, name in names.items()}
            for name in names.values():
                self._sorts.setdefault(name, sort)
        self._next: dict[str, int] = {}
        self._stems = {sort: stems[0] for sort, stems in _STEMS.items()}
        self._done: dict[str, str] = {}  # texts that were replaced before: most texts of a journal come again
        self._regex: re.Pattern[str] | None = None
        self._replace: list[tuple[re.Pattern[str], str]] = []

    def keep(self, original: str) -> None:
        """Leave this original as it is, whatever pattern it matches."""
        self.kept.add(original)
        self._forget()

    def replace(self, rules: Iterable[tuple[re.Pattern[str], str]]) -> None:
        """Further rules, (pattern, text), which come before all others."""
        self._replace += rules

    def add(self, sort: str, original: str, like: str = "") -> str:
        """The name of an original. `like`: another original of the same thing, whose name it gets."""
        if not original or original in self.kept:
            return original
        if sort == "hosts" and original.partition(".")[0] in self.kept:
            return self._host(original)
        key = _same_as(sort, original)
        if key not in self._same:
            name = (self._same.get(_same_as(sort, like)) if like else None) or self._new(sort)
            self.table[sort][original] = self._same[key] = name
            self._sorts.setdefault(name, sort)
            if sort in _TYPED:
                self._forget()
        return self._given(self._same[key])

    def _given(self, name: str) -> str:
        self.used[self._sorts.get(name, "own")].add(name)
        return name

    def _forget(self) -> None:
        self._regex = None
        self._done.clear()

    def _new(self, sort: str) -> str:
        first = self._next.get(sort, 1)
        stem = self._stems[sort]
        number = next(each for each in count(first) if f"{stem}{_number(sort, each)}" not in self._sorts)
        self._next[sort] = number + 1
        return f"{stem}{_number(sort, number)}"

    def expect(self, originals: Iterable[str]) -> None:
        """Choose how the names of each sort begin: as none of these originals does."""
        known = [each.lower() for each in (*originals, *self._same, *self.kept)]
        for sort, stems in _STEMS.items():
            alike = (re.compile(rf"{stem}(?:\d+|[a-z]{{1,3}})") for stem in stems)
            free = [stem for stem, each in zip(stems, alike, strict=True) if not any(map(each.fullmatch, known))]
            self._stems[sort] = (free or [*stems])[0]

    def apply(self, text: str) -> str:
        """The text with every original replaced."""
        if text not in self._done:
            replaced = text
            for pattern, instead in self._replace:
                replaced = pattern.sub(lambda found, instead=instead: self._own(found, instead), replaced)
            replaced = self._compiled().sub(self._replacement, self._numbered(replaced))
            self._done[text] = replaced
        return self._done[text]

    def apply_jobs(self, text: str) -> str:
        """A text about jobs with every known job replaced. Most jobs are numbers, which other texts may have, too."""
        known = [re.escape(job) for job in sorted(self.table["jobs"], key=lambda job: (-len(job), job))]
        if not known:
            return text
        pattern = rf"(?<![A-Za-z0-9.,-])(?:{'|'.join(known)})(?![A-Za-z0-9]|[.,]\d)"
        return re.sub(pattern, lambda found: self.add("jobs", found[0]), text)

    def _numbered(self, text: str) -> str:
        """The text with every node that is called by a number replaced, where that can only be the name of one."""
        known = {node for node in self.table["nodes"] if is_number(node)}
        if not known:
            return text

        def named(found: re.Match[str]) -> str:
            return self.add("nodes", found[0]) if found[0] in known else found[0]

        return NUMBERED_NODES.sub(lambda found: re.sub(r"\d+", named, found[0]), text)

    def _own(self, found: re.Match[str], instead: str) -> str:
        if not found[0]:
            return ""
        self.table["own"][found[0]] = found.expand(instead)
        self.used["own"].add(found[0])
        return self.table["own"][found[0]]

    def _compiled(self) -> re.Pattern[str]:
        """One pattern for everything: what is replaced once is not read again."""
        if self._regex is None:
            plain = [each for sort in _TYPED for each in self.table[sort] if not is_number(each)]
            stays = [own_names(self._lineage), *([alone("|".join(_alternatives(self.kept)))] if self.kept else [])]
            parts = [f"(?P<stays>{'|'.join(stays)})(?!\\.\\w)"]
            parts += [f"(?P<p{number}_{sort}>{pattern})" for number, (sort, pattern) in enumerate(PATTERNS)]
            parts += [f"(?P<known>{alone('|'.join(_alternatives(plain)))})"] if plain else []
            siblings = self._siblings()
            parts += [f"(?P<sibling>{siblings})"] if siblings else []
            self._regex = re.compile("|".join(parts), re.IGNORECASE)
        return self._regex

    def _siblings(self) -> str:
        """Nodes that the journal does not name but that are numbered as those it names; and Slurm's lists of them."""
        stems = {found[1] for node in self.table["nodes"] if (found := _NUMBERED_NODE.fullmatch(node))}
        if not stems:
            return ""
        alternatives = "|".join(re.escape(stem) for stem in sorted(stems, key=lambda stem: (-len(stem), stem)))
        return rf"(?<![A-Za-z0-9/.=])(?:{alternatives})(?:\d+(?![A-Za-z0-9])|\[[\d,-]+\])"

    def _replacement(self, found: re.Match[str]) -> str:
        text, group = found[0], found.lastgroup or ""
        if group == "stays" or text in self.kept:
            return text
        if group == "known":
            name = self._same.get(text.lower())
            if name is None or (len(text) < _SHORT and not self._exactly(text)):
                return text
            return self._given(name)
        if group == "sibling":
            return self.add("nodes", text)
        return self._by_pattern(group.partition("_")[2], text)

    def _exactly(self, text: str) -> bool:
        return any(text in names for names in self.table.values())

    def _by_pattern(self, sort: str, text: str) -> str:
        if text.lower() in self._same:
            return self._given(self._same[text.lower()])
        if sort == "paths":
            return self._path(text)
        if sort == "addresses" and NO_ADDRESS.fullmatch(text):
            return text
        if sort == "hosts":
            return self._host(text)
        return self.add(sort, text)

    def _path(self, text: str) -> str:
        """The folder's name, and the last part with the names in it replaced."""
        path = PurePosixPath(text)
        folder = text if text.endswith("/") else str(path.parent)
        last = "" if text.endswith("/") else f"/{self._compiled().sub(self._replacement, path.name)}"
        return f"{self.add('paths', folder.rstrip('/'))}{last}"

    def _host(self, text: str) -> str:
        """The name of a host; a node's full name is the node's."""
        short = text.partition(".")[0]
        if short in self.kept:
            self.table["hosts"][text] = self._same[text.lower()] = short
            return short
        return self.add("hosts", text, like=short)

    def counts(self) -> dict[str, int]:
        """How many originals of each sort were replaced, without sorts that had none."""
        return {sort: len(found) for sort, found in self.used.items() if found}


def is_number(original: str) -> bool:
    """Whether it is too common a number to be replaced wherever it stands."""
    return len(original) < _SERIAL and original.isdigit()


def _same_as(sort: str, original: str) -> str:
    """The key under which an original has its replacement. A number is another's if it is of another sort."""
    if not is_number(original):
        return original.lower()
    return f"{'nodes' if sort == 'hosts' else sort}:{original}"


def placeholders() -> re.Pattern[str]:
    """What stands in the place of an original, and of what was left out, in lower case."""
    stems = "|".join(re.escape(stem) for stems in _STEMS.values() for stem in stems)
    return re.compile(
        rf"(?<![a-z0-9])(?:{stems})(?:\d+|[a-z]{{1,3}})(?![a-z0-9])|\[[a-z ]+ of \d+ words?, left out[^\]]*\]"
    )


def alone(alternatives: str) -> str:
    """A pattern for names that stand alone: no letter or digit before or behind them."""
    return rf"(?<![A-Za-z0-9])(?:{alternatives})(?![A-Za-z0-9])"


def _alternatives(originals: Iterable[str]) -> list[str]:
    return [re.escape(each) for each in sorted(originals, key=lambda each: (-len(each), each)) if each]


def _number(sort: str, number: int) -> str:
    if sort != "people":
        return str(number).zfill(_PADDED.get(sort, 1))
    letters = ""
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return letters
