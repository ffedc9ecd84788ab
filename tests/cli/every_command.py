"""Runs every command in every kind of stream, for test_every_command.py: `python -m tests.cli.every_command SITE`.

One process imports everything; each command runs in a fork of it. Prints one JSON object for each run.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opt_ops import cli
from tests import imported_commands  # noqa: F401 (each fork has them)

_PATIENCE = 240  # seconds: a command that hangs fails the test

ARGUMENTS = {
    "alerts test": [],
    "campaign forecast": ["sizes"],
    "campaign render": ["sizes"],
    "campaign start": ["more", "--recipes", "opt-tiny", "--dry-run"],
    "campaign status": ["sizes"],
    "campaign stop": ["sizes", "--dry-run"],
    "ckpt list": ["12", "-o", "wide"],
    "ckpt prune": ["12", "--dry-run"],
    "ckpt release": ["12/100", "--out", "mine", "--licence", "apache-2.0"],
    "ckpt scores": ["12", "-o", "wide"],
    "ckpt verify": ["12", "100"],
    "compare": ["12", "13"],
    "daemon status": [],
    "daemon stop": [],
    "daemon unit": ["systemd"],
    "data show": ["12", "--step", "100"],
    "doctor": [],
    "drill flip-bit": ["12", "--dry-run"],
    "drill hang": ["12", "--dry-run"],
    "drill kill-daemon": ["12", "--dry-run"],
    "drill kill-node": ["12", "n2", "--dry-run"],
    "drill kill-pair": ["12", "--dry-run"],
    "drill kill-rank": ["12", "--dry-run"],
    "drill lr": ["12", "--dry-run"],
    "drill nan": ["12", "--dry-run"],
    "drill slow-standby": ["12", "--dry-run"],
    "drill xid": ["12", "--node", "n2", "--dry-run"],
    "events": ["12"],
    "explain": ["12"],
    "glossary": [],
    "init": ["--to", "new.toml"],
    "ledger": [],
    "logbook handover": ["12"],
    "logbook publish": ["12", "--redact", "--to", "published"],
    "logbook render": ["12"],
    "logbook update": ["12"],
    "logs": ["12.00-a0"],
    "pending": [],
    "node allow": ["12", "n2", "--dry-run"],
    "node check": [],
    "node exclude": ["12", "n1", "--dry-run"],
    "node explain": ["xid", "79"],
    "node ledger": ["--all"],
    "node list": ["12", "-o", "wide"],
    "note": ["12", "größer 日本", "--no-wait"],
    "playbook check": [],
    "playbook list": ["-o", "wide"],
    "playbook show": ["loss_spike"],
    "playbook try": ["12", "--all"],
    "q": ["-o", "wide"],
    "replay": ["--scenario", "none"],
    "run approve": ["12-i000", "--no-wait"],
    "run ask": ["12", "--dry-run"],
    "run decline": ["12-i000", "--no-wait"],
    "run forecast": ["12"],
    "run fork": ["12", "--dry-run"],
    "run hand-back": ["12", "--dry-run"],
    "run list": ["-o", "json"],
    "run pause": ["12", "--dry-run"],
    "run recipes": [],
    "run resume": ["12", "--dry-run"],
    "run rollback": ["12", "--dry-run"],
    "run set": ["12", "lr=1e-4", "--dry-run"],
    "run shadow": [".", "--dry-run"],
    "run show": ["12"],
    "run start": ["opt-tiny", "--dry-run"],
    "run stop": ["12", "--dry-run"],
    "run suggest": ["12"],
    "run take-over": ["12", "--dry-run"],
    "signals blame": ["."],
    "signals replay": ["curve.csv"],
    "trainer check": ["--ranks", "1", "--", "false"],
    "watch": ["12"],
    "why": ["12"],
}

NOT_RUN = {
    "ckpt evaluate": "starts the harness, which takes half a minute; tests/e2e/test_evaluate.py runs it",
    "ckpt serve": "serves until Ctrl-C; tests/e2e/test_serve.py runs it",
    "daemon ensure": "starts a daemon that outlives the test",
    "daemon run": "does not end",
    "logbook open": "opens a browser",
    "mlflow link": "needs a lineage that was sent; tests/chronicles/mlflow_mirror runs it",
    "mlflow open": "serves until Ctrl-C",
    "mlflow sync": "imports MLflow, which takes seconds",
    "run explain": "is the function of `explain`",
    "run logs": "is the function of `logs`",
    "run note": "is the function of `note`",
    "run watch": "is the function of `watch`",
    "run watch-job": "follows a log; tests/watch_job runs it",
}

# They start other programs.
SLOW = (
    *("doctor", "node check", "logbook render", "run recipes", "run start", "run fork"),
    *("campaign start", "campaign render", "campaign forecast"),
)

STREAMS = ("file", "stdout closed", "stderr closed", "all closed", "reader gone", "disk full")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of all commands, with their nouns."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path)
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


def _arrange(streams: str, out: int, err: int) -> None:
    """Set up the file descriptors and the stream objects, as Python does at its start."""
    descriptors = {1: out, 2: err}
    if streams == "reader gone":
        reader, descriptors[1] = os.pipe()
        os.close(reader)
    if streams == "disk full":
        descriptors[1] = os.open("/dev/full", os.O_WRONLY)
    for number, other in descriptors.items():
        os.dup2(other, number)
    closed = {"stdout closed": (1,), "stderr closed": (2,), "all closed": (0, 1, 2)}.get(streams, ())
    for number in closed:
        os.close(number)
    sys.stdin = None if 0 in closed else io.TextIOWrapper(io.FileIO(0), "ascii")  # type: ignore[assignment]
    sys.stdout = None if 1 in closed else io.TextIOWrapper(io.FileIO(1, "w"), "ascii")  # type: ignore[assignment]
    sys.stderr = (
        None if 2 in closed else io.TextIOWrapper(io.FileIO(2, "w"), "ascii", "backslashreplace")  # type: ignore[assignment]
    )


def run(words: Sequence[str], streams: str) -> dict[str, Any]:
    """Run one command in a fork. Returns how it left and what it said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                signal.alarm(_PATIENCE)
                _arrange(streams, out.fileno(), err.fileno())
                sys.argv = ["opt-ops", *words]
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            finally:  # whatever happened: this copy of the test must not go on
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode("ascii", "replace"))
    return {"words": [*words], "streams": streams, "code": status, "out": said[0], "err": said[1]}


def main() -> None:
    """Run all of them in the folder that the command line names."""
    os.chdir(Path(sys.argv[1]))
    for name, arguments in ARGUMENTS.items():
        for streams in STREAMS[:2] if name in SLOW else STREAMS:
            print(json.dumps(run([*name.split(), *arguments], streams)), flush=True)


if __name__ == "__main__":
    main()
