"""Fork servers: processes begin with the modules imported that they need, which takes seconds otherwise.

``multiprocessing`` has one server for all, with the modules that were named last. A worker of pytest-xdist imports all
tests, so that would be those of another file.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver, spawn
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

_preparation = spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    """A new process would import the main module again, and that is pytest: it takes longer than most commands."""
    return {key: value for key, value in _preparation(name).items() if not key.startswith("init_main")}


class Forks(ForkServerContext):
    """A context with a server of its own, which starts with its first process."""

    def __init__(self, *modules: str) -> None:
        super().__init__()
        self._server = forkserver.ForkServer()
        self._server.set_forkserver_preload([__name__, *modules])

    def start(self, process: BaseProcess) -> None:
        """Start a process of this context."""
        with (
            patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process),
            patch.object(spawn, "get_preparation_data", _without_main),
        ):
            process.start()

    def run(
        self, module: str, args: Sequence[str], where: Path, variables: Mapping[str, str], ignored: Sequence[int] = ()
    ) -> Forked:
        """Start ``python -m module`` with these arguments and this environment, in the folder ``where``.

        Signals that are ``ignored`` are so from the start, as if they were inherited.
        """
        return Forked(self, module, args, where, variables, ignored)


def _run(
    module: str,
    args: Sequence[str],
    where: Path,
    variables: Mapping[str, str],
    ignored: Sequence[int],
    out: Connection,
    err: Connection,
) -> None:
    """What an interpreter does that is told to run this module. The module ends its process itself."""
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    time.tzset()
    os.chdir(where)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Forked:
    """What tests use of `subprocess.Popen`, with both streams as pipes of text."""

    def __init__(
        self,
        forks: Forks,
        module: str,
        args: Sequence[str],
        where: Path,
        variables: Mapping[str, str],
        ignored: Sequence[int],
    ) -> None:
        self.args = (module, *args)
        self._said: list[bytes] = [b"", b""]
        pipes = [forks.Pipe(duplex=False) for _ in self._said]
        (_, out), (_, err) = pipes
        self._process = forks.Process(target=_run, args=(module, args, where, dict(variables), ignored, out, err))
        forks.start(self._process)
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self._readers = [
            threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in enumerate(r for r, _ in pipes)
        ]
        for (_, ours), reader in zip(pipes, self._readers, strict=True):
            ours.close()
            reader.start()

    def _read(self, number: int, pipe: Connection) -> None:
        with pipe:
            while more := os.read(pipe.fileno(), 65536):
                self._said[number] += more

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`: negative for a signal, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code if it has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Returns its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end. Returns what it wrote to stdout and to stderr."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join(timeout)
        out, err = (said.decode() for said in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """As `subprocess.Popen` does."""
        self.send_signal(signal.SIGKILL)
