"""Requests of operators: `inbox/<uuid>.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from opt_ops.errors import OptOpsError
from opt_ops.ports import Request
from opt_ops.runfolder.files import NOT_AS_PROMISED, WarnOnce, read_json, write_json

log = logging.getLogger(__name__)


class FileInbox:
    """`inbox/<uuid>.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "inbox"
        self._warnings = WarnOnce()

    def requests(self) -> Sequence[Request]:
        """Those that are waiting, oldest first."""
        waiting: list[tuple[float, Request]] = []
        for path in self._folder.glob("*.json"):
            try:
                fields = read_json(path)
                if fields is None:
                    continue
                request = Request(
                    request=path.stem,
                    author=str(fields["author"]),
                    verb=str(fields["verb"]),
                    arguments=dict(fields["arguments"]),
                )
                waiting.append((float(fields["ts"]), request))
            except (OptOpsError, *NOT_AS_PROMISED) as error:
                log.error("%s is no request and was set aside: %r", path, error)
                path.rename(path.with_suffix(".refused"))
            except OSError as error:  # somebody's umask, a file server that is away: it waits
                self._warnings.add(path, error)
        return [request for _, request in sorted(waiting, key=lambda pair: pair[0])]

    def put(self, request: Request, ts: float) -> None:
        """Ask the daemon for something."""
        fields = {"ts": ts, "author": request.author, "verb": request.verb, "arguments": request.arguments}
        write_json(self._folder / f"{request.request}.json", json.loads(json.dumps(fields)))

    def done(self, request: str) -> None:
        """It is journaled: take it out."""
        (self._folder / f"{request}.json").unlink(missing_ok=True)
