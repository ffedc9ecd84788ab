"""How far a lineage is mirrored into each store: `chronicle/mlflow.json`.

It only saves work: if it is deleted, everything is sent once more, and nothing in the store changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronicles.mlflow_mirror.content import Choice
from chronicles.mlflow_mirror.store import without_passwords
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import read_json, write_json

_VERSION = 3  # what earlier versions call sent lacks validation losses (1), tokens and numbers for columns (2)


class Cursor:
    """What one store was sent of one lineage. Every change is written at once."""

    def __init__(self, path: Path, store: str) -> None:
        self._path, self._store = path, store
        self._all = _read(path)
        mine = self._all["stores"].get(store, {})
        self._seq: int = mine.get("seq", 0)
        self._runs: dict[str, str] = mine.get("runs", {})
        self._attempts: dict[str, Any] = mine.get("attempts", {})
        self._kept: dict[str, int] = mine.get("settled", {"step": 0, "attempts": 0, "ledger": 0})
        self._files: dict[str, str] = mine.get("files", {})
        self._columns: dict[str, list[int]] = mine.get("columns", {})
        self.experiment: str = mine.get("experiment", "")  # its id

    @property
    def runs(self) -> Mapping[str, str]:
        """The ids of the store's runs, by name; that of the lineage is empty."""
        return self._runs

    def begin(self, experiment: str, runs: Mapping[str, str]) -> None:
        """Take the ids of the experiment and of its runs, by name. What was sent to a run that is gone is forgotten."""
        if any(runs.get(name) != identity for name, identity in self._runs.items()):
            self._attempts, self._files, self._columns = {}, {}, {}
            self._kept = {"step": 0, "attempts": 0, "ledger": 0}
        self.experiment, self._runs = experiment, dict(runs)
        self._save()

    def attempt(self, name: str) -> tuple[int, Choice | None]:
        """How many telemetry lines of an attempt were sent, and under which choice."""
        known = self._attempts.get(name)
        if known is None:
            return 0, None
        return known["lines"], Choice(every=known["every"], windows=tuple((a, b) for a, b in known["windows"]))

    def sent_attempt(self, name: str, lines: int, choice: Choice) -> None:
        """Note that so many lines of an attempt were sent under this choice."""
        self._attempts[name] = {"lines": lines, "every": choice.every, "windows": choice.windows}
        self._save()

    @property
    def kept(self) -> tuple[int, int, int]:
        """Of the kept curve: the last step that was sent, the number of attempts then; and of the ledger's samples."""
        return self._kept["step"], self._kept["attempts"], self._kept["ledger"]

    def sent_kept(self, step: int, attempts: int, ledger: int) -> None:
        """Note that the kept curve was sent up to this step."""
        self._kept = {"step": step, "attempts": attempts, "ledger": ledger}
        self._save()

    def columns(self, run: str) -> tuple[int, int]:
        """Of the numbers for columns of a run: how many reports' values and marks were sent."""
        progress, marks = self._columns.get(run, (0, 0))
        return progress, marks

    def sent_columns(self, run: str, progress: int, marks: int) -> None:
        """Note that so many values and marks of a run were sent."""
        self._columns[run] = [progress, marks]
        self._save()

    def has_file(self, run: str, name: str, digest: str) -> bool:
        """Whether this very file was sent to the run."""
        return self._files.get(f"{run}/{name}") == digest

    def sent_file(self, run: str, name: str, digest: str) -> None:
        """Note that the file was sent to the run."""
        self._files[f"{run}/{name}"] = digest
        self._save()

    def done(self, seq: int) -> None:
        """Note that everything up to this entry of the journal was sent."""
        self._seq = seq
        self._save()

    def _save(self) -> None:
        self._all["stores"][self._store] = {
            "seq": self._seq,
            "experiment": self.experiment,
            "runs": self._runs,
            "attempts": self._attempts,
            "settled": self._kept,
            "files": self._files,
            "columns": self._columns,
        }
        write_json(self._path, self._all)


def store_name(tracking_uri: str, experiment: str) -> str:
    """The name of a store in the file: without passwords."""
    return f"{without_passwords(tracking_uri)} {experiment}"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = read_json(path)
    except OptOpsError:
        known = None  # a damaged file counts as none
    return known if isinstance(known, dict) and known.get("v") == _VERSION else {"v": _VERSION, "stores": {}}
