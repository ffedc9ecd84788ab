"""Every command, in an ASCII locale, with every kind of stream: no traceback, no surprise, a sensible exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import typer.main

from opt_ops.cli import app
from opt_ops.core import events as e
from tests.cli.every_command import ARGUMENTS, NOT_RUN, STREAMS, commands
from tests.cli.test_cli import told

ROOT = Path(__file__).parents[2]
CODES = {0, 1, 2, 3, 4, 5, 65, 75, 141}


def site(folder: Path) -> Path:
    """A lineage that holds text which no ASCII locale has, and which a terminal would obey."""
    story = told()
    hostile = "größer 日本 \x1b[31m \x9b \u202e 😀"
    story.write(e.NoteAdded(request="r9", author="Müller", target="12", text=hostile))
    story.save(folder / "runs" / "12")
    logs = folder / "runs/12/12.00/a0/logs"
    logs.mkdir(parents=True)
    (logs / "rank-0000.log").write_bytes(b"gr\xc3\xb6\xc3\x9fer \x1b[31m \xff\n")
    (folder / "curve.csv").write_text("step,loss\n1,2.0\n2,2.0\n")
    (folder / "opt-ops.toml").write_text("[mlflow]\nenabled = false\n")
    return folder


def test_every_command_is_run_or_has_a_reason():
    assert sorted(commands(typer.main.get_command(app))) == sorted([*ARGUMENTS, *NOT_RUN])


def test_no_command_fails_because_of_a_stream_or_a_locale(tmp_path: Path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.every_command", str(site(tmp_path))],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["streams"] for each in runs} == set(STREAMS)
    for each in runs:
        what = f"opt-ops {' '.join(each['words'])} ({each['streams']})"
        assert each["code"] in CODES, f"{what}: {each['code']}: {each['err']}"
        for word in ("Traceback", "unexpected", "Exception ignored", "codec", "no Unicode text"):
            assert word not in each["out"] + each["err"], f"{what}: {each['err']}"
        assert "\x1b" not in each["out"] + each["err"], what
    told_by = {(" ".join(each["words"]), each["streams"]): each for each in runs}
    assert "gr??er" in told_by["events 12", "file"]["out"]
    assert "learning rate x 0.75" in told_by["explain 12", "file"]["out"]
