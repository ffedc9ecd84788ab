"""Requests of operators to the daemon: `inbox/<uuid>.json`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from opt_ops.errors import OptOpsError
from opt_ops.ports import Request
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import FileRefused, names_in, read_json, write_json
from opt_ops.runfolder.left_out import LeftOutCounter

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_LARGEST_REQUEST = 1024 * 1024  # bytes
_MOST_REQUESTS = 1000  # that are read at once, the first by name: a neighbour may fill the folder


class FileInbox:
    """The inbox of a lineage. No content of it raises.

    Only requests of this user, or of root, are taken. What cannot be moved or deleted is set aside in memory.
    """

    def __init__(self, folder: Path, left_out: LeftOutCounter | None = None) -> None:
        self._folder = folder / "inbox"
        self._left_out = left_out or LeftOutCounter(folder)
        self._set_aside: set[str] = set()
        """Names of files that are not looked at again by this daemon process."""
        self._known: dict[str, tuple[float, Request]] = {}
        """The requests that wait, by the name of the file. A file is whole when it gets its name, and stays so."""

    def requests(self) -> Sequence[Request]:
        """Return the waiting requests, oldest first. A file that is not a request is renamed to `.refused`."""
        try:
            names = sorted(set(names_in(self._folder, ".json")) - self._set_aside)[:_MOST_REQUESTS]
        except OSError as error:
            self._left_out.unreadable("requests", self._folder, error)
            return []
        for name in (each for each in names if each not in self._known):
            path = self._folder / name
            try:
                fields = read_json(path, _LARGEST_REQUEST, orders=True)
                if fields is not None:
                    self._known[name] = _request_of(f.Record(fields), path.stem)
            except (FileRefused, OptOpsError, f.BadField) as error:
                self._refuse(path, getattr(error, "strerror", None) or str(error))
            except OSError as error:  # permissions, or a file server that does not answer: try again later
                self._left_out.unreadable("requests", path, error)
        self._known = {name: self._known[name] for name in names if name in self._known}
        return [request for _, request in sorted(self._known.values(), key=lambda pair: pair[0])]

    def _refuse(self, path: Path, why: str) -> None:
        self._left_out.add("requests", self._folder, f"{path.name}: {why}")
        try:
            path.rename(path.with_suffix(".refused"))
        except OSError as error:
            self._set_aside.add(path.name)
            log.warning("%s cannot be renamed and is not looked at again: %s", path, error)

    def put(self, request: Request, ts: float) -> None:
        """Leave a request for the daemon."""
        fields = {"ts": ts, "author": request.author, "verb": request.verb, "arguments": request.arguments}
        write_json(self._folder / f"{request.request}.json", json.loads(json.dumps(fields)))

    def done(self, request: str) -> None:
        """Remove a request that is journaled. One that cannot be removed is not looked at again."""
        path = self._folder / f"{request}.json"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._set_aside.add(path.name)
            self._left_out.unreadable("requests", path, error)
            log.warning("%s is answered and cannot be removed: %s", path, error)


def _request_of(record: f.Record, name: str) -> tuple[float, Request]:
    """The request, and when it was made. Its arguments are judged by verb (supervise/operator_requests.py)."""
    if not _ID.fullmatch(name):
        raise f.BadField("the name of the file is no id of a request: letters, digits, `.`, `_` and `-`")
    arguments, asked_at = record.required("arguments", f.members), record.required("ts", f.moment)
    unusable = f.why_not_plain(arguments)
    request = Request(
        request=name,
        author=record.required("author", f.name),
        verb=record.required("verb", f.name),
        arguments={} if unusable else arguments,
        unusable=f"`arguments` {unusable}" if unusable else "",
        asked_at=asked_at,
    )
    return asked_at, request
