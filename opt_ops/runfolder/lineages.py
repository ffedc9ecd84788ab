"""The folders under `runs/`: which lineages there are, and their state as anyone may read it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_ops.core.events import Entry
from opt_ops.core.names import lineage_of
from opt_ops.core.state.fold import replay
from opt_ops.core.state.model import State
from opt_ops.errors import NotFound, UsageError
from opt_ops.runfolder.journal import read

if TYPE_CHECKING:
    from opt_ops.ports import Request


def folders(runs: Path) -> list[Path]:
    """All lineages' folders, by number.

    Raises:
        UsageError: `runs` is a file.
    """
    if not runs.is_dir():
        if runs.exists():
            raise UsageError(f"runs: {runs} is a file, and must be a folder", "set `runs` in opt-ops.toml to another")
        return []
    return sorted((p for p in runs.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda path: int(path.name))


def folder(runs: Path, identifier: str) -> Path:
    """The folder of the lineage to which a lineage, run or attempt belongs.

    Raises:
        UsageError: `identifier` is none of these.
        NotFound: there is no such lineage.
    """
    try:
        name = lineage_of(identifier)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = runs / name
    if not path.is_dir():
        known = ", ".join(p.name for p in folders(runs)) or "none"
        raise NotFound(f"no lineage {name} in {runs}; there are: {known}", "opt-ops q lists them")
    return path


def entries(path: Path) -> list[Entry]:
    """The lineage's journal."""
    return read(path / "journal")[0]


def state(path: Path) -> State:
    """The lineage's state, by its journal."""
    return replay(entries(path))


def create(runs: Path) -> Path:
    """A folder for the next lineage. Two callers at once get two numbers."""
    runs.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in folders(runs)), default=0) + 1
    while True:
        path = runs / str(number)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def ask(path: Path, author: str, verb: str, arguments: Mapping[str, Any], ts: float) -> Request:
    """Put a request into the lineage's inbox for the daemon."""
    from opt_ops.ports import Request
    from opt_ops.runfolder.inbox import FileInbox

    request = Request(request=str(uuid.uuid4()), author=author, verb=verb, arguments=arguments)
    FileInbox(path).put(request, ts)
    return request
