"""Requests of operators to the daemon: `inbox/<uuid>.json`."""

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
    """The inbox of a lineage."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "inbox"
        self._warnings = WarnOnce()

    def requests(self) -> Sequence[Request]:
        """Return the waiting requests, oldest first. A file that is not a request is renamed to `.refused`."""
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
                log.error("%s is not a request and was renamed to .refused: %r", path, error)
                path.rename(path.with_suffix(".refused"))
            except OSError as error:  # permissions, or a file server that does not answer: try again later
                self._warnings.add(path, error)
        return [request for _, request in sorted(waiting, key=lambda pair: pair[0])]

    def put(self, request: Request, ts: float) -> None:
        """Leave a request for the daemon."""
        fields = {"ts": ts, "author": request.author, "verb": request.verb, "arguments": request.arguments}
        write_json(self._folder / f"{request.request}.json", json.loads(json.dumps(fields)))

    def done(self, request: str) -> None:
        """Remove a request that is journaled."""
        (self._folder / f"{request}.json").unlink(missing_ok=True)
