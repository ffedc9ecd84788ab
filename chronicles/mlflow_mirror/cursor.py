"""How far a lineage was mirrored into a store: `chronicle/mlflow.json`.

It saves work and decides nothing: delete it, and everything is sent once more, to no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chronicles.mlflow_mirror.content import Choice
from opt_ops.errors import OptOpsError
from opt_ops.runfolder.files import read_json, write_json

_VERSION = 2  # 1 knew of no validation losses: what it says was sent lacks them


class Cursor:
    """What one store was sent of one lineage. Every change is written at once; stores do not know of each other."""

    def __init__(self, path: Path, store: str) -> None:
        self._path, self._store = path, store
        self._all = _read(path)
        mine = self._all["stores"].get(store, {})
        self._seq: int = mine.get("seq", 0)
        self._runs: dict[str, str] = mine.get("runs", {})
        self._attempts: dict[str, Any] = mine.get("attempts", {})
        self._kept: dict[str, int] = mine.get("settled", {"step": 0, "attempts": 0, "ledger": 0})
        self._files: dict[str, str] = mine.get("files", {})

    def begin(self, runs: Mapping[str, str]) -> None:
        """These are the store's runs, by name. What was sent to others is forgotten: they were deleted, say."""
        if any(runs.get(name) != identity for name, identity in self._runs.items()):
            self._attempts, self._files = {}, {}
            self._kept = {"step": 0, "attempts": 0, "ledger": 0}
        self._runs = dict(runs)
        self._save()

    def attempt(self, name: str) -> tuple[int, Choice | None]:
        """How many telemetry lines were gone through, and under which choice."""
        known = self._attempts.get(name)
        if known is None:
            return 0, None
        return known["lines"], Choice(every=known["every"], windows=tuple((a, b) for a, b in known["windows"]))

    def sent_attempt(self, name: str, lines: int, choice: Choice) -> None:
        """So many lines were gone through under this choice."""
        self._attempts[name] = {"lines": lines, "every": choice.every, "windows": choice.windows}
        self._save()

    @property
    def kept(self) -> tuple[int, int, int]:
        """The last step of the settled curve, how many attempts there were then, and how many numbers of the ledger."""
        return self._kept["step"], self._kept["attempts"], self._kept["ledger"]

    def sent_kept(self, step: int, attempts: int, ledger: int) -> None:
        """The settled curve was sent up to this step."""
        self._kept = {"step": step, "attempts": attempts, "ledger": ledger}
        self._save()

    def has_file(self, run: str, name: str, digest: str) -> bool:
        """Whether this very file was sent to the run."""
        return self._files.get(f"{run}/{name}") == digest

    def sent_file(self, run: str, name: str, digest: str) -> None:
        """The file was sent to the run."""
        self._files[f"{run}/{name}"] = digest
        self._save()

    def done(self, seq: int) -> None:
        """Everything up to this journal entry was sent."""
        self._seq = seq
        self._save()

    def _save(self) -> None:
        self._all["stores"][self._store] = {
            "seq": self._seq,
            "runs": self._runs,
            "attempts": self._attempts,
            "settled": self._kept,
            "files": self._files,
        }
        write_json(self._path, self._all)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = read_json(path)
    except OptOpsError:
        known = None  # damaged: as good as none
    return known if isinstance(known, dict) and known.get("v") == _VERSION else {"v": _VERSION, "stores": {}}
