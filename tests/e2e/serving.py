"""A running `opt-ops ckpt serve`, and what a client sees of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.site import PATIENCE, until


class Served:
    """The command, started and ready."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        command = [sys.executable, "-m", "opt_ops", "ckpt", "serve", *words, "-o", "jsonl"]
        variables = {**os.environ, "TMPDIR": str(folder), **environment}  # SIGKILL leaves the engine's log behind
        with (folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.errors = folder / "stderr"
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        self.item: dict[str, Any] = json.loads(line)
        self.url: str = self.item["url"]
        self.all = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def send(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """The status and the text of an answer; `body` as JSON, or bytes as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, named), timeout=PATIENCE
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, **body: Any) -> tuple[int, Any]:
        status, text = self.send("/v1/completions", body)
        return status, json.loads(text)

    def text(self, **body: Any) -> str:
        status, answer = self.ask(**body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def events(self, **body: Any) -> list[Any]:
        """What is streamed, without its end, which must be there."""
        status, text = self.send("/v1/completions", {**body, "stream": True})
        assert status == 200, text
        *events, done = [each.removeprefix("data: ") for each in text.split("\n\n") if each]
        assert done == "[DONE]"
        return [json.loads(each) for each in events]

    def listening(self) -> set[tuple[str, int]]:
        """The addresses at which its processes listen."""
        return {
            tuple(each.laddr)
            for process in self.all
            if process.is_running()
            for each in process.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }

    def all_ended(self) -> bool:
        return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in self.all)

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal, wait until all its processes have ended; the exit code of the command."""
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        until(self.all_ended)
        self.close()
        return code

    def close(self) -> None:
        """End it, if it runs."""
        if self.process.poll() is None:
            self.end(signal.SIGTERM)
        if self.process.stdout:
            self.process.stdout.close()
