"""Publishes a logbook: draws it from a redacted record, checks the files, and only then gives them their place."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chronicles.logbook.render import FOLDER, write_files
from chronicles.publish.check import Leak, leaks
from chronicles.publish.left_out import telling_words
from chronicles.publish.names import SCHEMA, SORTS, Names, placeholders
from chronicles.publish.redact import Redaction, Wishes, is_word
from chronicles.record import LineageRecord
from chronicles.report.build import build
from chronicles.report.model import LineageReport
from opt_ops.config import Rates
from opt_ops.core.codec import encode
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import read_json, write_json, write_text

More = Callable[[LineageRecord, LineageReport], Mapping[str, str]]

TABLE = "redaction.json"  # in the lineage's chronicle folder
_SHOWN = 10  # leaks
_SENTENCE = 12  # characters: a shorter text that is left out may be a word of ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What was written, or would be. The item of `opt-ops/published/1`."""

    files: tuple[str, ...]
    replaced: Mapping[str, int]  # by sort
    left_out: Mapping[str, int]  # by sort: notes, reasons, log lines, completions

    def row(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"files": list(self.files), "replaced": dict(self.replaced), "left_out": dict(self.left_out)}


class Publication:
    """A logbook that is to be published, redacted."""

    def __init__(
        self,
        folder: Path,
        record: LineageRecord,
        wishes: Wishes,
        site: Iterable[tuple[str, str]] = (),
        rules: Sequence[tuple[re.Pattern[str], str]] = (),
    ) -> None:
        self._table, self._lineage = folder / FOLDER / TABLE, record.lineage
        self._names = Names(record.lineage, _known(self._table))
        self._names.replace(rules)
        self._redaction = Redaction(record, self._names, wishes, site)

    def summary(self, files: Sequence[Path] = ()) -> Published:
        """What was replaced and left out."""
        return Published(
            files=tuple(map(str, files)), replaced=self._names.counts(), left_out=dict(self._redaction.left.found)
        )

    def text(self, text: str) -> str:
        """A text with every original replaced."""
        return self._redaction.text(text)

    def write(self, to: Path, rates: Rates | None = None, more: More | None = None) -> Published:
        """Draw the files, check them, and only then move them into the folder `to`.

        Args:
            to: The folder.
            rates: The site's factors.
            more: Gives the texts of other files by name, from the redacted record and its report.

        Raises:
            OptOpsError: the check found an original; nothing is kept.
            OSError: a file cannot be written.
        """
        to.mkdir(parents=True, exist_ok=True)
        redacted = self._redaction.record
        hidden = Path(tempfile.mkdtemp(prefix=".publish-", dir=to))
        try:
            report = build(redacted, rates)
            files = write_files(hidden, redacted, report)
            for name, text in (more(redacted, report) if more else {}).items():
                write_text(hidden / name, text)
                files.append(hidden / name)
            found = self._leaks(files)
            if found:
                raise OptOpsError(_told(found), _HINT)
            self._keep_table()
            placed = [to / file.name for file in files]
            for file, place in zip(files, placed, strict=True):
                file.replace(place)
        finally:
            shutil.rmtree(hidden)
        return self.summary(placed)

    def _leaks(self, files: Sequence[Path]) -> list[Leak]:
        """What the check finds. A plain word that no redacted input has is a word of ours."""
        known = self._names.table
        kept = self._names.kept
        originals = {sort: [each for each in names if each not in kept] for sort, names in known.items()}
        originals["domains"] = sorted({domain for each in known["hosts"] if (domain := _domain(each)) not in kept})
        left = self._redaction.left
        settings = {each for run in self._redaction.record.state.runs.values() for each in run.settings}
        originals["left out"] = [text for text in left.texts if len(text) >= _SENTENCE]
        originals["left out"] += [word for word in telling_words(left) if word not in settings | kept]
        found = list(leaks(files, originals, placeholders(), self._lineage))
        inputs = self._inputs() if found else set[str]()
        return [leak for leak in found if not (_is_word(leak) and leak.original.lower() not in inputs)]

    def _inputs(self) -> set[str]:
        """The words of everything that the files are drawn from and that others wrote, in lower case."""
        texts = (text for entry in self._redaction.record.entries for text in _texts(encode(entry.event)))
        return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}

    def _keep_table(self) -> None:
        """The table of replacements, for the owner of the run alone: publishing again uses it again."""
        self._table.parent.mkdir(parents=True, exist_ok=True)
        mask = os.umask(0o177)
        try:
            write_json(self._table, {"schema": SCHEMA, "replaced": {k: v for k, v in self._names.table.items() if v}})
        finally:
            os.umask(mask)
        self._table.chmod(0o600)


def unredacted(record: LineageRecord, to: Path, rates: Rates | None = None) -> Published:
    """Write the logbook as it is."""
    files = write_files(to, record, build(record, rates))
    return Published(files=tuple(map(str, files)), replaced={}, left_out={})


_HINT = "opt-ops logbook publish again, with --replace 'REGEX=TEXT' for it"


def _known(table: Path) -> Mapping[str, Mapping[str, str]]:
    """The replacements of the time before.

    Raises:
        OptOpsError: the table cannot be read: other names would contradict what is published already.
    """
    value: Any = read_json(table)
    if value is None:
        return {}
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not _is_table(value.get("replaced")):
        why = f"{table} is no table of replacements ({SCHEMA}): other names would contradict what is published already"
        raise OptOpsError(why, f"restore the file; if nothing is published yet: rm {table}")
    return value["replaced"]


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(sort in SORTS and isinstance(names, dict) for sort, names in value.items())


def _texts(value: Any) -> Iterator[str]:
    """The texts within a value, and the keys that are no words of ours."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            if not is_word(key):
                yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from _texts(item)


def _domain(host: str) -> str:
    """What the hosts of a site have in common: `login3.falcon.example.org` → `falcon.example.org`; else empty."""
    domain = host.partition(".")[2]
    return domain if "." in domain and not host.replace(".", "").isdigit() else ""


def _is_word(leak: Leak) -> bool:
    word = leak.original.isalpha() and leak.original.islower()
    return word and leak.sort in ("people", "partitions", "accounts", "hosts")


def _told(found: Sequence[Leak]) -> str:
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    where = "\n  ".join(map(str, found[:_SHOWN]))
    return f"nothing was published: what should have been replaced stands in\n  {where}{more}"
