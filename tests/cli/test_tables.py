"""Tables on terminals of any width, and for programs."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.cli.shared.output import Column, laid_out, text
from tests.cli.test_cli import told

COLUMNS = [Column("STEP", "step", right=True), Column("NAME", "name"), Column("WHY", "why"), Column("SEEN", "seen")]
ROWS = [["7", "n1", "the fan of GPU 3 has stopped and its memory is hot", "yes"], ["1200", "n2", "-", "no"]]


def test_what_fits_stands_in_columns():
    assert list(laid_out(COLUMNS, ROWS, True, 100)) == [
        "STEP  NAME  WHY                                                 SEEN",
        "   7  n1    the fan of GPU 3 has stopped and its memory is hot  yes",
        "1200  n2    -                                                   no",
    ]


def test_one_long_column_is_folded_between_words():
    assert list(laid_out(COLUMNS, ROWS, True, 45)) == [
        "STEP  NAME  WHY                          SEEN",
        "   7  n1    the fan of GPU 3 has         yes",
        "            stopped and its memory is",
        "            hot",
        "1200  n2    -                            no",
    ]


def test_in_a_narrow_terminal_it_stands_below_its_row():
    assert list(laid_out(COLUMNS, ROWS, True, 32)) == [
        "STEP  NAME  SEEN",
        "   7  n1    yes",
        "    why: the fan of GPU 3 has",
        "      stopped and its memory is",
        "      hot",
        "1200  n2    no",
    ]


WORDS = st.text("abcdefghij", min_size=1, max_size=30)
CELLS = st.lists(st.tuples(*[st.lists(WORDS, min_size=1, max_size=8).map(" ".join)] * 4), max_size=4)


@given(CELLS, st.integers(20, 200), st.booleans())
def test_no_word_is_broken_or_lost_at_any_width(cells: list[tuple[str, ...]], width: int, header: bool):
    shown = " ".join(laid_out(COLUMNS, cells, header, width)).split()
    for row in cells:
        for word in " ".join(row).split():
            assert word in shown


def test_numbers_have_no_negative_zero():
    assert text(-0.0) == "0"


def on_a_terminal(folder: Path, width: int, *arguments: str, **environment: str) -> str:
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "opt_ops", *arguments]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), **environment}
    with subprocess.Popen(command, cwd=folder, env=env, stdin=its, stdout=its, stderr=subprocess.DEVNULL):
        os.close(its)
        said = b""
        while True:
            try:
                said += (more := os.read(ours, 65536))
            except OSError:  # the other side is closed
                break
            if not more:
                break
    os.close(ours)
    return said.decode().replace("\r", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lineage 12."""
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("arguments", [["run", "show", "12"], ["run", "explain", "12"], ["doctor"], ["events", "12"]])
def test_lines_are_no_wider_than_the_terminal(site: Path, width: int, arguments: list[str]):
    shown = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(site, width, *arguments))
    spaces = re.escape(str(site))
    assert shown
    for line in shown.splitlines():
        assert len(line) <= width or re.search(rf"\S{{{width // 2}}}|{spaces}", line), line


def test_no_color_is_honoured(site: Path):
    assert "\x1b[" in on_a_terminal(site, 100, "q")
    assert "\x1b[" not in on_a_terminal(site, 100, "q", NO_COLOR="1")
