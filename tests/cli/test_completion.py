"""Completion as people get it: installed by its own option into a real shell, on a terminal, with the Tab key."""

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.runfolder.journal import Journal
from tests.cli.test_cli import told
from tests.processes import MARK

PROMPT = "ready>"
_PROGRAM = Path(sys.executable).parent / "opt-ops"
# By shell: how it is started with nothing of this machine's set-up but what the installation wrote.
SHELLS = {
    "bash": ["bash", "--noprofile", "-i"],
    "zsh": ["zsh", "-o", "no_global_rcs", "-i"],
    "fish": ["fish", "-i"],
}
_PROMPTS = {"bash": "PS1='rea''dy>'", "zsh": "PROMPT='rea''dy>'"}  # so that the echo of it is not yet the prompt


class Terminal:
    """A shell on a pseudo-terminal."""

    def __init__(self, command: list[str], home: Path) -> None:
        path = f"{_PROGRAM.parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(home), "TERM": "xterm", "LANG": "C.UTF-8", MARK: os.environ[MARK]}
        self._pid, self._side = pty.fork()
        if self._pid == 0:
            os.chdir(home)
            os.execvpe(command[0], command, environment)

    def shows(self, wanted: str, seconds: float = 120.0) -> str:
        """What has come until it holds `wanted`; or until nothing came any more."""
        said, until = "", time.monotonic() + seconds
        while wanted not in said and time.monotonic() < until:
            if select.select([self._side], [], [], 0.1)[0]:
                try:
                    said += re.sub(r"\x1b(?:\[[0-9;?]*[A-Za-z]|\([0B])|[\a\r]", "", os.read(self._side, 65536).decode())
                except OSError:
                    break
        return said

    def types(self, keys: str) -> None:
        """As from the keyboard."""
        os.write(self._side, keys.encode())

    def close(self) -> None:
        """End it, whatever it is at."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._side)


@pytest.fixture(scope="module", params=list(SHELLS))
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A shell, and a home with lineage 12 in which `opt-ops --install-completion` has been typed into it."""
    shell, home = request.param, tmp_path_factory.mktemp(request.param)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not on this machine")
    if not _PROGRAM.exists():
        pytest.skip("opt-ops is not installed beside this Python")
    journal = Journal(home / "runs" / "12" / "journal")
    for entry in told().entries:
        journal.append(journal.stamp(entry.event, entry.ts))
    (home / "site.toml").write_text("")
    terminal = Terminal(SHELLS[shell], home)
    try:
        terminal.types("opt-ops --install-completion\n")
        assert "completion installed" in terminal.shows("completion installed")
    finally:
        terminal.close()
    return shell, home


@pytest.fixture
def terminal(installed: tuple[str, Path]) -> Iterator[Terminal]:
    """The next shell that is opened there."""
    shell, home = installed
    opened = Terminal(SHELLS[shell], home)
    try:
        if shell in _PROMPTS:
            opened.types(f"{_PROMPTS[shell]}\n")
            opened.shows(PROMPT)
        if shell == "zsh":  # Typer's script only loads itself at the first Tab of a shell
            opened.types("opt-ops \t\x15")
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("opt-ops run exp\t", "opt-ops run explain"),
        ("opt-ops led\t", "opt-ops ledger"),
        ("opt-ops run show 12.0\t\t", "12.01"),
        ("opt-ops run explain 12-i00\t\t", "12-i001"),
        ("opt-ops -c site.toml node exclude 12 n\t\t", "n3"),
        ("opt-ops events 12 --kind incident_cl\t", "incident_closed"),
    ],
)
def test_tab_completes(terminal: Terminal, typed: str, completed: str):
    terminal.types(typed)
    assert completed in terminal.shows(completed)
