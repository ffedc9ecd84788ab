"""The logs of one attempt in a folder: `rank-<number>.log`, and `exits.json` where it is known how ranks ended."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from opt_ops.core.failures.cause_lines import CauseLines
from opt_ops.core.failures.classify_exit import last_words
from opt_ops.core.values import RankExit

_NAME = re.compile(r"rank-(\d{1,7})\.log")
_MOST = 64 * 1024 * 1024  # bytes at the end of a log that are read
_CHUNK = 1024 * 1024
_MOST_EXITS = 4 * 1024 * 1024  # bytes of exits.json


def read_log_set(folder: Path) -> dict[RankExit, str]:
    """Return every rank that ended badly, with the lines of its log that name a cause.

    Without `exits.json`, every rank that has a log counts as ended with code 1, at one time, on a node of its own name.
    What is no regular file, or not as docs/formats.md says, is left out.

    Raises:
        OSError: the folder cannot be read.
    """
    logs = {int(found[1]): path for path in sorted(folder.iterdir()) if (found := _NAME.fullmatch(path.name))}
    exits = _exits(folder / "exits.json")
    if exits is None:
        exits = [RankExit(rank=rank, node="", code=1, signal=None, at=0.0) for rank in logs]
    return {
        ended: _said(logs[ended.rank], ended) if ended.rank in logs else ""
        for ended in exits
        if ended.signal is not None or ended.code not in (0, None)
    }


def _exits(path: Path) -> list[RankExit] | None:
    text = _text(path, _MOST_EXITS)
    if text is None:
        return None
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    fields = cast(Mapping[str, Any], given)
    nodes = [str(node) for node in _list(fields.get("nodes"))]
    per_node = _number(fields.get("ranks_per_node")) or 1
    found: dict[int, RankExit] = {}
    for given in _list(fields.get("exits")):
        each = cast(Mapping[str, Any], given) if isinstance(given, dict) else {}
        rank, at = _number(each.get("rank")), each.get("at")
        if rank is None:
            continue
        place = rank // per_node
        found[rank] = RankExit(
            rank=rank,
            node=nodes[place] if place < len(nodes) else "",
            code=_number(each.get("code")),
            signal=_number(each.get("signal")),
            at=float(at) if isinstance(at, int | float) and math.isfinite(at) else math.inf,
        )
    return list(found.values())


def _list(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _number(value: Any) -> int | None:
    """A rank, an exit code or a signal: a whole number from 0 to a million."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1_000_000 else None


def _said(path: Path, ended: RankExit) -> str:
    lines = CauseLines()
    if (descriptor := _open_regular(path)) is not None:
        with os.fdopen(descriptor, "rb") as file, suppress(OSError):  # what was read until an error must do
            file.seek(max(0, os.fstat(descriptor).st_size - _MOST))
            while data := file.read(_CHUNK):
                lines.feed(data)
    return last_words(ended, (found.line for found in lines.finish().found))


def _text(path: Path, most: int) -> str | None:
    descriptor = _open_regular(path)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            data = file.read(most + 1)
        except OSError:
            return None
    return data.decode(errors="replace") if len(data) <= most else None


def _open_regular(path: Path) -> int | None:
    """A descriptor; None if this is no regular file, or cannot be read. A pipe is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None
