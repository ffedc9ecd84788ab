"""Output into every kind of stream, in every locale; Ctrl-C at every moment. A traceback helps nobody here."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.text import printable, safe_json

ANY_TEXT = st.text(st.characters(exclude_categories=()))
OBEYED = [
    "\x1b",
    "\x9b",
    "\x7f",
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
    "\u2028",
    "\ud800",
]


@given(ANY_TEXT)
def test_json_for_a_terminal_has_the_same_values(text: str):
    document = safe_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert json.loads(document) == {text: [text]}
    assert not any(sign in document or sign in printable(text) for sign in OBEYED)


def run(folder: Path, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash; in it, `$OPT_OPS` is the command."""
    whole = {**os.environ, "OPT_OPS": f"{sys.executable} -m opt_ops", **environment}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=folder,
        env=whole,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("$OPT_OPS q >&-", {0}),
        ("$OPT_OPS q 2>&-", {0}),
        ("$OPT_OPS q <&- >&- 2>&-", {0}),
        ("$OPT_OPS nonsense >&- 2>&-", {2}),
        ("$OPT_OPS q 2>/dev/full", {0}),
        ("$OPT_OPS glossary >/dev/full", {1}),
        ("$OPT_OPS glossary | true", {0, 141}),
        ("$OPT_OPS glossary | head -1", {0, 141}),
        ("$OPT_OPS --help | head -1", {0, 141}),
        ("LC_ALL=C PYTHONUTF8=0 $OPT_OPS glossary", {0}),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=latin-1 $OPT_OPS glossary", {0}),
        ("$OPT_OPS events $'12\\xff'", {2}),
        ("$OPT_OPS run note 12 $'\\xff'", {2}),
        ("LC_ALL=C PYTHONUTF8=0 $OPT_OPS run note 12 größer", {2}),
    ],
)
def test_no_stream_and_no_locale_ends_in_a_traceback(tmp_path: Path, line: str, codes: set[int]):
    (tmp_path / "opt-ops.toml").write_text("")
    done = run(tmp_path, line)
    assert done.returncode in codes, done.stderr
    for word in ("Traceback", "unexpected", "Exception ignored", "report the traceback"):
        assert word not in done.stderr + done.stdout


def test_a_closed_stdout_is_no_file_of_the_site(tmp_path: Path):
    done = run(tmp_path, "$OPT_OPS init >&-; cat opt-ops.toml")
    assert "Wrote" not in done.stdout
    assert "[trainer]" in done.stdout


# Runs opt-ops, and stops while it imports the module that is named: so Ctrl-C comes there, on any machine.
STOPS = """
import sys, time, runpy
stop, sys.argv = sys.argv[-1], ["opt-ops", "glossary"]
class Stop:
    def find_spec(self, name, path, target=None):
        if name == stop:
            print("here", flush=True)
            time.sleep(600)
sys.meta_path.insert(0, Stop())
runpy.run_module("opt_ops", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module", ["opt_ops.cli", "typer", "opt_ops.cli.shared.options", "pydantic", "opt_ops.cli.glossary"]
)
def test_ctrl_c_is_silent_also_while_the_command_is_imported(tmp_path: Path, module: str):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS, module], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=240)
    assert (process.returncode, out, said) == (130, b"", b"")


def test_json_is_json_in_an_ascii_locale_too(tmp_path: Path):
    done = run(tmp_path, "LC_ALL=C PYTHONUTF8=0 $OPT_OPS glossary -o json")
    assert done.stdout.isascii()
    assert json.loads(done.stdout) == json.loads(run(tmp_path, "$OPT_OPS glossary -o json").stdout)
