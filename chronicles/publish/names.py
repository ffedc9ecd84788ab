"""The table of replacements: each original has one name, the same in every file and whenever it is published."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import PurePosixPath

from chronicles.publish.patterns import NO_ADDRESS, PATTERNS, own_names

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
_PADDED = {"nodes": 3, "gpus": 3}  # digits
_NUMBERED_NODE = re.compile(r"(.*[A-Za-z].*?)(\d+)")
_SERIAL = 8  # digits: a shorter number is too common to be replaced wherever it stands
_SHORT = 3  # characters: shorter names are only matched in the same case


class Names:
    """Originals by sort, and what replaces them. Texts that are replaced add what their patterns find."""

    def __init__(self, lineage: str, known: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._lineage = lineage
        self.table: dict[str, dict[str, str]] = {sort: dict((known or {}).get(sort, {})) for sort in SORTS}
        self.used: dict[str, set[str]] = {sort: set() for sort in SORTS}
        self.kept: set[str] = set()
        self._same: dict[str, str] = {}  # in lower case: every original and its replacement
        for names in self.table.values():
            self._same |= {original.lower(): name for original, name in names.items()}
        self._regex: re.Pattern[str] | None = None
        self._replace: list[tuple[re.Pattern[str], str]] = []

    def keep(self, original: str) -> None:
        """Leave this original as it is, whatever pattern it matches."""
        self.kept.add(original)
        self._regex = None

    def replace(self, rules: Iterable[tuple[re.Pattern[str], str]]) -> None:
        """Further rules, (pattern, text), which come before all others."""
        self._replace += rules

    def add(self, sort: str, original: str, like: str = "") -> str:
        """The name of an original. `like`: another original of the same thing, whose name it gets."""
        if not original or original in self.kept:
            return original
        if sort == "hosts" and original.partition(".")[0] in self.kept:
            return self._host(original)
        if original.lower() in self._same:
            self._note(original)
        else:
            self.used[sort].add(original)
            name = self._same.get(like.lower()) if like else None
            self.table[sort][original] = name or self._new(sort)
            self._same[original.lower()] = self.table[sort][original]
            self._regex = None
        return self._same[original.lower()]

    def _new(self, sort: str) -> str:
        known = {name for names in self.table.values() for name in names.values()}
        originals = {original for names in self.table.values() for original in names} | self.kept
        stems = [stem for stem in _STEMS[sort] if not any(each.lower().startswith(stem) for each in originals)]
        stem = (stems or [_STEMS[sort][-1]])[0]
        return next(name for number in count(1) if (name := f"{stem}{_number(sort, number)}") not in known)

    def apply(self, text: str) -> str:
        """The text with every original replaced."""
        for pattern, instead in self._replace:
            text = pattern.sub(lambda found, instead=instead: self._own(found, instead), text)
        return self._compiled().sub(self._replacement, text)

    def apply_jobs(self, text: str) -> str:
        """A text about jobs with every known job replaced. Most jobs are numbers, which other texts may have, too."""
        known = [re.escape(job) for job in sorted(self.table["jobs"], key=lambda job: (-len(job), job))]
        if not known:
            return text
        pattern = rf"(?<![A-Za-z0-9.,-])(?:{'|'.join(known)})(?![A-Za-z0-9]|[.,]\d)"
        return re.sub(pattern, lambda found: self.add("jobs", found[0]), text)

    def _own(self, found: re.Match[str], instead: str) -> str:
        if not found[0]:
            return ""
        self.used["own"].add(found[0])
        self.table["own"][found[0]] = found.expand(instead)
        return self.table["own"][found[0]]

    def _compiled(self) -> re.Pattern[str]:
        """One pattern for everything: what is replaced once is not read again."""
        if self._regex is None:
            sorts = (sort for sort in SORTS if sort not in ("jobs", "own"))
            plain = [each for sort in sorts for each in self.table[sort] if len(each) >= _SERIAL or not each.isdigit()]
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
            self._note(text)
            return name
        if group == "sibling":
            return self.add("nodes", text)
        return self._by_pattern(group.partition("_")[2], text)

    def _exactly(self, text: str) -> bool:
        return any(text in names for names in self.table.values())

    def _note(self, text: str) -> None:
        for sort, names in self.table.items():
            self.used[sort] |= {each for each in names if each.lower() == text.lower()}

    def _by_pattern(self, sort: str, text: str) -> str:
        if text.lower() in self._same:
            self._note(text)
            return self._same[text.lower()]
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
        return {
            sort: len({self._same.get(each.lower(), each) for each in found})
            for sort, found in self.used.items()
            if found
        }


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
