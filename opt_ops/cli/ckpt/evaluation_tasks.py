"""Which tasks `ckpt evaluate` is asked for: names of the harness, groups of ours, and folders with YAML files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops.core.events.evaluation import limited
from opt_ops.errors import NotFound, UsageError

GROUPS = {
    "opt-16": (
        "hellaswag", "storycloze_2016", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq",
        "cb", "copa", "wic", "wsc", "multirc", "rte", "record", "wsc273",
    ),
    "opt-bias": ("crows_pairs_english", "toxigen"),
}  # fmt: skip
"""The suites of the OPT paper, under the names of lm-eval 0.4.13."""

REMARKS = {
    "opt-16": "storycloze_2016: its data is sent to people on request, and must be on this machine.",
    "opt-bias": "Not evaluated: lm-eval has no StereoSet, none of the paper's five dialogue sets, no SaferDialogues "
    "and no Safety Bench. Its realtoxicityprompts asks a web service, which an offline cluster cannot.",
}

_PIECE = 1 << 20
_LONGEST = 150  # characters of a name in that of a file, which has 255 bytes
_TASK = re.compile(r"^(?:task|group):", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is scored in one piece, into one result file."""

    spec: str  # the harness's name, or the absolute path of a YAML file
    name: str  # that of the file
    definition: str = ""  # of a task of one's own: the first digits of the SHA-256 over its folder
    shots: int = 0
    limit: int | None = None

    @property
    def stem(self) -> str:
        """Of the result file."""
        first = f".first-{self.limit}" if self.limit else ""
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", self.name).lstrip(".")[:_LONGEST]
        if safe != self.name:  # two names may look the same then
            safe = f"{safe}-{hashlib.sha256(self.name.encode('utf-8', 'replace')).hexdigest()[:8]}"
        return f"{safe}.{self.shots}-shot{first}"

    def is_file(self, name: str) -> bool:
        """Whether a result file of that name is one of this."""
        return re.fullmatch(re.escape(self.stem) + r"(?:\.\d+)?\.json", name) is not None

    def version(self, of_task: object) -> str:
        """The version of a task: the harness's, and what else decides which documents are scored."""
        own = f"+{self.definition}" if self.definition else ""
        return limited(f"{of_task}{own}", self.limit)


def wanted(tasks: Sequence[str], shots: int, limit: int | None) -> list[Wanted]:
    """Tasks by name, by group of ours, or by folder.

    Raises:
        UsageError: a name is empty or no name.
        NotFound: a folder has no tasks.
    """
    found: dict[str, Wanted] = {}
    for text in (each for word in tasks for each in GROUPS.get(word, (word,))):
        for spec, name, definition in _parts(text):
            found[spec] = Wanted(spec=spec, name=name, definition=definition, shots=shots, limit=limit)
    return list(found.values())


def _parts(text: str) -> Iterator[tuple[str, str, str]]:
    folder = Path(text)
    if "/" not in text and not (folder.is_dir() and any(folder.glob("*.yaml"))):
        if not re.fullmatch(r"[A-Za-z0-9][\w.,:+-]{0,254}", text) or text.endswith(".yaml"):
            raise UsageError(f"--tasks {text!r}: neither the name of a task nor a folder", "for example --tasks piqa")
        yield text, text, ""
        return
    files = [
        file
        for file in sorted(folder.glob("*.yaml"))
        if file.is_file() and _TASK.search(file.read_text("utf-8", "replace"))
    ]
    if not files:
        what = "has no *.yaml with a line `task:`" if folder.is_dir() else "is no folder"
        raise NotFound(f"--tasks {text}: {what}", "name a folder with YAML files of lm-eval, or a task of lm-eval")
    definition = _digest(folder)
    for file in files:
        yield str(file.resolve()), file.stem, definition


def _digest(folder: Path) -> str:
    """Over the names and bytes of all files in a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(os.fsencode(f"{file.relative_to(folder)}\0{file.stat().st_size}\0"))
            with file.open("rb") as opened:
                while piece := opened.read(_PIECE):
                    found.update(piece)
    return found.hexdigest()[:10]
