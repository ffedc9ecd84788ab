"""A real MLflow server, for as long as a test needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def serving(command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> Iterator[str]:
    """The server, once it answers at `url`."""
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield _answering(url, server, log)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(120)


def _answering(url: str, server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return url
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"MLflow does not answer: {log.read_text()[-2000:]}")
