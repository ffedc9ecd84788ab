"""Signals in a process that imports nothing but the contract."""

import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

BEFORE_THE_FOLDER_IS_KNOWN = """
import os, signal, sys, threading
from pathlib import Path
from opt_ops.contract.signals import Signals

signals = Signals()
os.kill(os.getpid(), signal.SIGUSR2)
signals.dump_stacks_to(Path(sys.argv[1]) / "stacks" / "rank-0000.txt")
os.kill(os.getpid(), signal.SIGUSR2)
threading.Event().wait()
"""


def test_without_a_file_stacks_go_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file where a folder must be")
    command = [sys.executable, "-c", BEFORE_THE_FOLDER_IS_KNOWN, tmp_path]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while said.count("end of dump") < 2 and (line := process.stderr.readline()):
            said += line
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143, said
    assert said.count("Current thread 0x") == 2
    assert said.count("note: stacks go to stderr: [Errno 17] File exists") == 1
