"""Warm start: the node agent starts the trainer once more, and forks ranks from it when it needs them.

To import torch and a trainer takes seconds, or minutes from a busy file system. The warm process has done that. It has
no rank, no thread and no GPU. A trainer that can do this says ``warm_start`` in ``capabilities`` of ``config.json``. It
begins like this, on its main thread and before it handles signals::

    if warm_start.asked():
        import everything  # no thread, no GPU, no file of the attempt

        warm_start.serve()  # returns in a new process, with its own sys.argv and os.environ

Memory, measured with torch 2.13 and our trainer on Linux without a GPU: the warm process holds 350 MB, of which 207 MB
are its own. A forked rank begins with these 207 MB, and shares all but 2 of them. So the warm process costs 207 MB as
long as no rank was forked from it, and next to nothing afterwards.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from opt_ops.contract.environment import ATTEMPT, MEMBERS, NODE

CAPABILITY = "warm_start"
"""In ``capabilities`` of ``config.json``: the trainer does as above."""

WARM = "OPT_OPS_WARM"
"""Set by the node agent for the warm process: the number of the descriptor of its connection to the agent."""

_MARKS = "OPT_OPS_MARKS"
_ROOM = 8192  # bytes: two paths of 4,096 at most; one that does not fit is left out
_ADOPTION_SECONDS = 5.0  # until the agent is the parent; that takes milliseconds
_NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def asked() -> bool:
    """Whether this process shall become a warm process: import everything, then call :func:`serve`."""
    return WARM in os.environ


def variables(descriptor: int) -> dict[str, str]:
    """What the node agent adds to the environment of a warm process.

    Args:
        descriptor: of the connection.
    """
    # Without the last one, torch.cuda.is_available() asks the driver, which then refuses all forked processes.
    return {WARM: str(descriptor), _MARKS: " " * _ROOM, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def serve(outdated: Callable[[], bool] = lambda: False) -> None:
    """Wait for the agent's requests, and fork a process for each. Returns in that process, never in this one.

    The new process is a child of the agent. It has a session of its own, ends with the agent, handles signals as Python
    does, and has ``sys.argv``, ``os.environ``, the working folder and the log that the agent names.

    Args:
        outdated: whether the program on disk is another one by now than the one that was imported. It is asked at each
            request. If so, this process ends: the agent then starts the command as it is, and another warm process.

    Raises:
        RuntimeError: there are threads, or this is not the main thread. A forked process would have locks that nobody
            releases.
    """
    if threading.current_thread() is not threading.main_thread() or threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise RuntimeError(f"a warm process must have no thread but the main thread, and has {names}.")
    agent = os.getppid()
    for number in _NOTICES:  # what the scheduler tells ranks is nothing to a process without a rank
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=int(os.environ[WARM]))
    connection.setblocking(True)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # the garbage collector of a forked process must not write to what it shares with this one
    try:
        connection.sendall(json.dumps({"options": sys.argv[1:]}).encode() + b"\n")
        while True:
            asked_for, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
            if not asked_for or not descriptors or outdated():
                _leave(0)
            if _fork(socket.socket(fileno=descriptors[0]), connection, agent):
                return
    except ConnectionError:  # the agent has ended
        _leave(0)


def _fork(request: socket.socket, connection: socket.socket, agent: int) -> bool:
    """Fork a process for a request. Returns whether this is the new process.

    It is forked twice: the process in between ends at once, and the agent adopts the new one.
    """
    with request:
        try:
            between = os.fork()
        except OSError as error:
            _say(request, f"fork: {error}")
            return False
        if between:
            os.waitpid(between, 0)
            return False
        try:
            connection.close()
            if os.fork():
                os._exit(0)
            _become(request, agent)
        except BaseException as error:  # noqa: BLE001  broad on purpose: what was begun here must not go on as the trainer
            print(f"a forked process cannot start: {error!r}", file=sys.stderr, flush=True)
            _say(request, f"{error!r}")
            os._exit(1)
    return True


def _become(request: socket.socket, agent: int) -> None:
    """Become the process that the request describes."""
    os.setsid()
    _end_with(agent)
    request.sendall(f"{os.getpid()}\n".encode())
    told = b""
    while data := request.recv(1 << 16):
        told += data
    if not told:  # the agent has given this process up
        os._exit(0)
    wanted: dict[str, Any] = json.loads(told)
    log = os.open(wanted["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir(wanted["directory"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv[1:] = wanted["options"]
    sys.orig_argv[:] = wanted["argv"]
    _show(wanted["environment"])
    for number in _NOTICES:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if faulthandler.is_enabled():
        faulthandler.enable()


def _end_with(agent: int) -> None:
    """Wait until the agent is the parent, and let the kernel end this process with it."""
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while os.getppid() != agent:
        if time.monotonic() > deadline:
            raise RuntimeError("the agent does not become the parent of a forked process")
        time.sleep(0.001)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:
        os._exit(1)


def _show(environment: dict[str, str]) -> None:
    """Show in ``/proc/<pid>/environ`` whose process this is. After a fork, it still shows what the warm process got.

    The agent finds by it what outlives a rank. The text takes the place of a variable that holds nothing else.
    """
    about = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    first, last = int(about[47]), int(about[48])  # env_start and env_end, proc(5)
    block = ctypes.string_at(first, last - first) if first else b""
    at = (b"\0" + block).find(f"\0{_MARKS}=".encode())
    room = len(_MARKS) + 1 + _ROOM
    named = [f"{name}={environment[name]}" for name in (NODE, ATTEMPT, MEMBERS) if name in environment]
    text = b"\0".join(os.fsencode(each) for each in named)
    if at >= 0 and len(text) <= room:
        ctypes.memmove(first + at, text.ljust(room, b"\0"), room)


def _say(request: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # the agent may have given it up
        request.sendall(f"{text}\n".encode())


def _leave(code: int) -> NoReturn:
    """End without what Python does at an exit: handlers of libraries were made for a process that trains."""
    os._exit(code)
