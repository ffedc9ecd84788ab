"""Fork servers: processes begin with the modules imported that they need, which takes seconds otherwise.

``multiprocessing`` has one server for all, with the modules that were named last. A worker of pytest-xdist imports all
tests, so that would be those of another file.
"""

from __future__ import annotations

from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from unittest.mock import patch


class Forks(ForkServerContext):
    """A context with a server of its own, which starts with its first process."""

    def __init__(self, *modules: str) -> None:
        super().__init__()
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload(list(modules))

    def start(self, process: BaseProcess) -> None:
        """Start a process of this context."""
        with patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process):
            process.start()
