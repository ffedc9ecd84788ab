"""A warm process, asked by hand as the node agent would: what its forked processes are, and when there are none."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.contract import warm_start

CODE = """
import os, sys, json, random, signal, faulthandler
faulthandler.enable()
from opt_ops.contract import warm_start
made = {"warm": os.getpid()}
warm_start._ADOPTION_SECONDS = 0.5 if "--alone" in sys.argv else 240.0
if warm_start.asked():
    warm_start.serve()
names = {number.name: repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
print(json.dumps({**made, "pid": os.getpid(), "argv": sys.argv[1:], "folder": os.getcwd(),
    "variables": dict(os.environ), "signals": names, "blocked": blocked, "random": random.random(),
    "asked": warm_start.asked(),
    "environ": open("/proc/self/environ").read().split(chr(0))}))
"""


class Warm:
    def __init__(self, *options: str) -> None:
        self.channel, theirs = socket.socketpair()
        variables = {**os.environ, **warm_start.variables(theirs.fileno())}
        command = [sys.executable, "-c", CODE, *options]
        with theirs:
            self.process = subprocess.Popen(command, env=variables, pass_fds=(theirs.fileno(),))
        self.channel.settimeout(240)
        self.opened = [self.channel]

    def request(self) -> socket.socket:
        """Ask for a process. Returns the connection to it."""
        ours, theirs = socket.socketpair()
        ours.settimeout(240)
        self.opened.append(ours)
        with theirs:
            socket.send_fds(self.channel, [b"f"], [theirs.fileno()])
        return ours

    def ask(self) -> tuple[socket.socket, int]:
        """Ask for a process. Returns the connection to it, and its number."""
        request = self.request()
        return request, int(request.recv(100))


@pytest.fixture
def warm(request: pytest.FixtureRequest) -> Iterator[Warm]:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: forked processes become ours
    warm = Warm(*getattr(request, "param", ("--attempt", "a1")))
    yield warm
    warm.process.kill()
    warm.process.wait()
    for each in warm.opened:
        each.close()
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def test_a_forked_process_is_what_a_new_one_would_be(warm: Warm, tmp_path: Path):
    assert json.loads(warm.channel.recv(1000)) == {"options": ["--attempt", "a1"]}
    found = []
    for number in range(2):
        request, pid = warm.ask()
        log = tmp_path / f"log-{number}"
        log.write_text("before\n")
        variables = {
            "OPT_OPS_NODE": "n1",
            "OPT_OPS_ATTEMPT": str(tmp_path),
            "OPT_OPS_MEMBERS": f"/m/{number}",
            "A": "\udcff",
        }
        wanted = {"argv": ["x", "--b"], "options": ["--b"], "environment": variables}
        request.sendall(json.dumps({**wanted, "directory": str(tmp_path), "log": str(log)}).encode())
        request.close()
        assert os.waitpid(pid, 0)[1] == 0
        before, line = log.read_text().splitlines()
        assert before == "before"
        said = json.loads(line)
        assert (said["pid"], said["warm"], said["asked"]) == (pid, warm.process.pid, False)
        assert (said["argv"], said["variables"], said["folder"]) == (["--b"], variables, str(tmp_path))
        assert said["blocked"] == []
        assert "SIG_DFL" in said["signals"]["SIGTERM"]
        assert "SIG_DFL" in said["signals"]["SIGUSR1"]
        assert "default_int_handler" in said["signals"]["SIGINT"]
        for name in ("OPT_OPS_NODE", "OPT_OPS_ATTEMPT", "OPT_OPS_MEMBERS"):
            assert f"{name}={variables[name]}" in said["environ"]
        found.append(said["random"])
    assert found[0] != found[1], "each has its own random numbers"
    assert warm.process.poll() is None


def test_a_process_that_its_agent_has_given_up_ends(warm: Warm):
    request, pid = warm.ask()
    request.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    second, pid = warm.ask()
    second.sendall(b"{}")  # no request
    second.shutdown(socket.SHUT_WR)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert "KeyError" in second.recv(1000).decode()
    assert warm.process.poll() is None


@pytest.mark.parametrize("warm", [["--alone"]], ids=["alone"], indirect=True)
def test_a_process_that_the_agent_cannot_adopt_ends(warm: Warm):
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    assert "does not become the parent" in warm.request().recv(1000).decode()


def test_it_ends_with_its_agent_and_not_by_notices(warm: Warm):
    assert warm.channel.recv(1000)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        warm.process.send_signal(number)
    _, pid = warm.ask()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    warm.channel.close()
    assert warm.process.wait(240) == 0


def test_a_process_with_threads_is_no_warm_process():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="helper")
    thread.start()
    try:
        with pytest.raises(RuntimeError, match=r"no thread but the main thread.*helper"):
            warm_start.serve()
    finally:
        stop.set()
        thread.join()
