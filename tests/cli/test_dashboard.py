"""`opt-ops watch` in a real terminal: what it shows at which size, and how it ends. And the curve that it draws."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from opt_ops.cli.run import dashboard
from opt_ops.cli.shared.text_curve import curve
from opt_ops.cli.shared.watched import Watched
from opt_ops.core import events as e
from opt_ops.core.values import AllocationStatus
from opt_ops.runfolder.journal import Journal
from tests.cli.test_cli import told
from tests.e2e.stub_trainer import telemetry

PATIENCE_SECONDS = 120.0  # of a loaded machine


def trains(folder: Path, attempt: str, first: int, last: int, loss: Callable[[int], float]) -> None:
    """Telemetry of an attempt, its last step just now."""
    file = folder / "runs/12" / attempt / "telemetry.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        telemetry(step, 5e-4, loss(step), 0.5) | {"ts": time.time() - (last - step)} for step in range(first, last + 1)
    ]
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    told().save(tmp_path / "runs" / "12")
    trains(tmp_path, "12.00/a0", 380, 460, lambda step: 3.0 if step < 410 else 9.0)
    trains(tmp_path, "12.01/a1", 301, 320, lambda step: 2.5)
    return tmp_path


class Terminal:
    """A command in a pseudo-terminal of a given size."""

    def __init__(self, folder: Path, columns: int, lines: int, **environment: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        begin = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        words = ["-m", "opt_ops", "run", "watch", "12", "--every", "0.3"]
        command = [sys.executable, "-c", begin, sys.executable, *words]  # Ctrl-C reaches whom the terminal controls
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": "", **environment},
            start_new_session=True,
        )
        self.seen = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def types(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def waits_for(self, sign: str) -> str:
        """Read until the sign is there; returns what was read since the last wait, without colours."""
        read, until = "", time.monotonic() + PATIENCE_SECONDS
        while sign not in read:
            assert time.monotonic() < until, f"no {sign!r} in {read[-3000:]!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    read += os.read(self._master, 65536).decode("utf-8", "replace")
                    read = re.sub(r"\x1b\[[0-9;]*m", "", read)
        self.seen += read
        return read

    def ends(self) -> int:
        """The exit code; the terminal is as it was before."""
        self.waits_for("\x1b[?1049l")  # the usual screen again
        code = self.process.wait(PATIENCE_SECONDS)
        assert termios.tcgetattr(self._slave) == self.before
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminals() -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as opened:

        def begin(folder: Path, columns: int, lines: int, **environment: str) -> Terminal:
            terminal = Terminal(folder, columns, lines, **environment)
            opened.callback(terminal.close)
            return terminal

        yield begin


def test_it_shows_everything_at_80_by_24_follows_what_grows_and_the_size_and_ends_on_q(
    site: Path, terminals: Callable[..., Terminal]
):
    terminal = terminals(site, 80, 24)
    shown = terminal.waits_for("q ends the view")
    for sign in ("TRAINING?", "nobody watches", "LOSS of the last 101 updates", "NODES", "INCIDENTS", "NEWEST"):
        assert sign in shown
    assert "12-i001  bad GPU: restart, proven DRILL d000" in shown
    assert max(len(line) for line in re.split(r"[\r\n]+", shown) if "─" in line) <= 80 + len("\x1b[H")
    trains(site, "12.01/a1", 321, 333, lambda step: 2.4)
    terminal.waits_for("step 333 of 1,000")
    terminal.resize(120, 40)
    terminal.waits_for(f"╰{'─' * 118}╯")
    terminal.types("xq")
    assert terminal.ends() == 0


def test_ctrl_c_ends_it_too_in_a_locale_without_unicode(site: Path, terminals: Callable[..., Terminal]):
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    terminal = terminals(site, 80, 24, **plain)
    terminal.waits_for("q ends the view")
    assert terminal.seen.isascii()
    assert "*****" in terminal.seen, "the curve"
    assert "\\u" not in terminal.seen
    terminal.types("\x03")
    assert terminal.ends() == 0


def test_the_end_of_the_lineage_ends_the_view(site: Path, terminals: Callable[..., Terminal]):
    terminal = terminals(site, 80, 24)
    terminal.waits_for("q ends the view")
    story = told()
    known = len(story.entries)
    story.see(e.StopRequested(request="s", author="ann", reason="wrong tokenizer"))
    story.ends()
    story.changed("12-n0", status=AllocationStatus.ENDED)
    story.see(e.AllocationFailed(allocation="12-n1", why="cancelled"))
    assert story.state.settled
    journal = Journal(site / "runs/12/journal")
    for entry in story.entries[known:]:
        journal.append(journal.stamp(entry.event, entry.ts))
    journal.close()
    assert "Lineage 12 is CANCELLED." in terminal.waits_for("opt-ops logbook open 12")
    assert terminal.process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize(("width", "height"), [(20, 8), (40, 12), (59, 14), (80, 24), (120, 40), (250, 90)])
def test_every_size_is_filled_and_none_overflows(site: Path, width: int, height: int):
    watched = Watched(site / "runs/12")
    watched.look(time.time())
    console = Console(width=width, height=height, force_terminal=True, color_system=None, file=io.StringIO())
    with console.capture() as captured:
        console.print(dashboard.screen(watched, width, height, time.time()), height=height)
    lines = captured.get().splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "NEWEST" in captured.get()
    assert ("NODES" in captured.get()) == (width >= 60 and height >= 14)


def test_a_curve_shows_the_lowest_and_highest_value_and_what_is_not_finite():
    flat_with_a_spike = [2.0] * 300 + [9.0] + [2.0] * 299
    drawn = curve(flat_with_a_spike, 60, 6)
    assert [len(line) for line in drawn] == [60] * 6
    assert drawn[0].strip(" ") != "", "one spike of 600 values is seen"
    assert all(sign != " " for sign in drawn[-1])
    assert "×" in curve([1.0, None, 2.0], 10, 3)[0]
    assert curve([], 5, 2) == ["     ", "     "]
