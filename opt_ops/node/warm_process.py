"""The warm process of a node: the trainer, with everything imported. Processes of the trainer are forked from it.

`opt_ops.contract.warm_start` is the other side. Whatever goes wrong with it, the command is started as it is, as on a
node without a warm process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from opt_ops.contract import warm_start
from opt_ops.contract.files import open_append
from opt_ops.core.names import attempt_folder
from opt_ops.node.log import log as say
from opt_ops.node.process_groups import ChildProcess, die_with_parent
from opt_ops.node.rank_start import ColdStart, shared_variables

READY_SECONDS = 600.0  # to import everything; on a busy shared file system that takes minutes
FORK_SECONDS = 10.0  # for the answer to a request; a fork takes milliseconds
MOST_FAILURES = 3  # in a row; then there is no warm process for this command any more
_MOST_OPTIONS = 2**22  # bytes of what the warm process says of itself


class ForkedProcess:
    """A process that the warm process has forked: a child of this one, by adoption."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Reap it. Returns its status (waitpid(2))."""
        return os.waitpid(self.pid, 0)[1]


class WarmProcess:
    """The warm process of this node, or none yet.

    Args:
        lineage: the lineage's folder.
        node: the name of this node.
    """

    def __init__(self, lineage: Path, node: str) -> None:
        self._lineage, self._node = lineage, node
        self._cold = ColdStart()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._said = b""
        self._launch: Mapping[str, Any] = {}
        """The orders that it was started by."""
        self._command: list[str] | None = None
        """What comes before the options in its command; None: it is not ready."""
        self._started_at = 0.0
        self._failures = 0
        self._next_start = 0.0
        self._given_up: tuple[list[str], Mapping[str, str]] | None = None

    def follow(self, launch: Mapping[str, Any] | None, named: bool) -> None:
        """Look at the process, replace it if the trainer has changed, and start one if there is none.

        Without a launch it stays: the next attempt starts from it.

        Args:
            launch: the present orders for an attempt.
            named: whether they say that this node keeps a warm process.
        """
        self._look()
        if launch is None:
            return
        if self._process is not None and not self._fits(launch):
            say("the trainer's command or environment has changed: the warm process is replaced")
            self._end()
        if self._process is None and named and not self._hopeless(launch) and time.monotonic() >= self._next_start:
            self._start(launch)

    @property
    def ready(self) -> bool:
        """Whether processes can be forked from it now."""
        return self._command is not None

    def settled(self, launch: Mapping[str, Any]) -> bool:
        """Whether it is ready, or will never be."""
        return self.ready or self._hopeless(launch)

    @property
    def pids(self) -> set[int]:
        """Its number, if there is one."""
        return set() if self._process is None else {self._process.pid}

    def start(self, launch: Mapping[str, Any], variables: Mapping[str, str], log: Path) -> ChildProcess:
        """Start a process of the trainer: forked from the warm process if that is ready, else as it is.

        Raises:
            OSError: it cannot be started.
        """
        self._look()
        if self._command is not None and self._fits(launch):
            try:
                return self._fork(launch, variables, log)
            except OSError as error:
                say(f"nothing can be forked from the warm process, so the command is started as it is: {error}")
                self._failed()
        return self._cold.start(launch, variables, log)

    def close(self) -> None:
        """End it."""
        self._end()

    def _fits(self, launch: Mapping[str, Any]) -> bool:
        """Whether it can stand for the command. Options may differ; what it has imported does not depend on them."""
        if launch["environment"] != self._launch["environment"]:
            return False
        if self._command is None:
            return launch["argv"][0] == self._launch["argv"][0]
        return launch["argv"][: len(self._command)] == self._command

    def _hopeless(self, launch: Mapping[str, Any]) -> bool:
        return self._given_up is not None and self._given_up == (launch["argv"][:1], launch["environment"])

    def _start(self, launch: Mapping[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        logs = self._lineage / attempt_folder(launch["attempt"]) / "logs"
        self._launch, self._said, self._command = launch, b"", None
        self._started_at = time.monotonic()
        with theirs:
            logs.mkdir(parents=True, exist_ok=True)
            try:
                with open_append(logs / f"warm-{self._node}.log") as file:
                    self._process = subprocess.Popen(
                        launch["argv"],
                        env={**shared_variables(self._lineage, launch), **warm_start.variables(theirs.fileno())},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                        preexec_fn=partial(_begin, os.getpid()),  # noqa: PLW1509  (the agent has no threads)
                    )
            except OSError:
                ours.close()
                self._failed()
                raise
        ours.setblocking(False)
        self._channel = ours

    def _look(self) -> None:
        """Take what it says. It says once that it is ready; an end of the connection is its own end."""
        if self._process is None or self._channel is None:
            return
        try:
            while data := self._channel.recv(1 << 16):
                self._said += data
                if len(self._said) > _MOST_OPTIONS:
                    break
        except BlockingIOError:
            if self._command is None and b"\n" in self._said:
                self._take_options()
            elif self._command is None and time.monotonic() - self._started_at > READY_SECONDS:
                say(f"the warm process is not ready after {READY_SECONDS:.0f} s; it is ended")
                self._failed()
            return
        except OSError as error:
            say(f"the connection to the warm process is broken: {error}")
        say(f"the warm process has ended; its log is logs/warm-{self._node}.log of {self._launch['attempt']}")
        self._failed()

    def _take_options(self) -> None:
        try:
            options = list(map(str, json.loads(self._said)["options"]))
        except (ValueError, KeyError, TypeError) as error:
            say(f"the warm process does not say what it should: {error!r}")
            self._failed()
            return
        argv = list(self._launch["argv"])
        if options != argv[len(argv) - len(options) :]:
            say("the command does not pass its options to the trainer as they are: ranks start without a warm process")
            self._failures = MOST_FAILURES
            self._failed()
            return
        self._command, self._failures = argv[: len(argv) - len(options)], 0
        say(f"the warm process is ready after {time.monotonic() - self._started_at:.1f} s")

    def _fork(self, launch: Mapping[str, Any], variables: Mapping[str, str], log: Path) -> ForkedProcess:
        assert self._channel is not None
        assert self._command is not None
        request = {
            "argv": launch["argv"],
            "options": launch["argv"][len(self._command) :],
            "environment": dict(variables),
            "directory": str(Path.cwd()),
            "log": str(log.absolute()),
        }
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(FORK_SECONDS)
            with theirs:
                socket.send_fds(self._channel, [b"f"], [theirs.fileno()])
            pid = _pid_from(ours)
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # it is our child, or this raises
                ours.sendall(json.dumps(request).encode())
                ours.shutdown(socket.SHUT_WR)
            except ChildProcessError:
                raise
            except OSError:
                os.kill(pid, signal.SIGKILL)
                raise
        return ForkedProcess(pid)

    def _failed(self) -> None:
        self._failures += 1
        self._next_start = time.monotonic() + 2.0 ** (self._failures - 1)
        if self._failures >= MOST_FAILURES:
            say(f"no warm process any more after {self._failures} failures: ranks start without one")
            self._given_up = (self._launch["argv"][:1], self._launch["environment"])
        self._end()

    def _end(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self._channel, self._command = None, None, None


def _begin(agent: int) -> None:
    """Run in the new process: it ends with the agent, and notices of the scheduler are not for it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(agent)


def _pid_from(channel: socket.socket) -> int:
    """The number of the process that was forked.

    Raises:
        OSError: there is none.
    """
    said = b""
    while not said.endswith(b"\n"):
        if not (data := channel.recv(4096)):
            raise OSError(said.decode(errors="replace") or "the connection ended")
        said += data
    if not said.strip().isdigit():
        raise OSError(said.decode(errors="replace").strip())
    return int(said)
