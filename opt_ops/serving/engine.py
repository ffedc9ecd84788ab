"""The process of an engine, and the one that counts tokens. Both end with the command that started them."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from opt_ops.core.text import clean
from opt_ops.errors import OptOpsError
from opt_ops.serving.keys import Model

LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.2
_LAST_LINES = 12
_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): ")
_LEAVE_SECONDS = 15.0  # the guard's time between SIGTERM and SIGKILL, and more
_TINY = {"prompt": "", "max_tokens": 1, "temperature": 0.0, "top_p": 1.0}  # the request that costs least
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_QUIET = {  # engines may neither ask the hub nor report to their makers
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def command(engine: str, program: str, folder: Path, model: Model, dtype: str, port: int) -> list[str]:
    """The command of an engine.

    Args:
        engine: `vllm` or `transformers`.
        program: vLLM's, or the Python that has transformers.
        folder: a model in Hugging Face's format.
        model: what it is.
        dtype: fp32, fp16 or bf16. vLLM would make fp16 of fp32 by itself.
        port: of the loopback.
    """
    where = ["--host", LOOPBACK, "--port", str(port)]
    if engine == "vllm":
        about = ["--served-model-name", model.name, "--max-model-len", str(model.positions), "--dtype", _DTYPES[dtype]]
        return [program, "serve", str(folder), *where, *about]
    # by its name, in its folder: `transformers serve` splits what it is given at "@"
    return [program, "-m", "transformers.cli.transformers", "serve", folder.name, *where]


class Engine:
    """An engine in a process group of its own.

    Args:
        kind: `vllm` or `transformers`.
        program: vLLM's, or the Python that has transformers.
        folder: a model in Hugging Face's format.
        model: what it is.
        dtype: of its weights.
        log: file for what it prints.
    """

    def __init__(self, kind: str, program: str, folder: Path, model: Model, dtype: str, log: Path) -> None:
        self.kind, self.model, self.log, self._folder, self._turn = kind, model, log, folder, Lock()
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self.port = probe.getsockname()[1]
        words = command(kind, program, folder, model, dtype, self.port)
        self._key = secrets.token_hex(16)  # vLLM wants it; one in the environment would shut the proxy out
        with log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "opt_ops.serving.guard", str(folder.parent), *words],
                env={**os.environ, **_QUIET, "VLLM_API_KEY": self._key},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether its process group is there."""
        return self._guard.poll() is None

    def wait_ready(self) -> None:
        """Wait until it has answered a completion. A large model takes minutes to load: there is no limit.

        Raises:
            OptOpsError: it ended before that, or cannot answer.
        """
        while not self._healthy():
            self.require_alive()
            time.sleep(_LOOK_SECONDS)
        status, said = self.answer(_TINY, None)
        self.require_alive()
        if status != http.HTTPStatus.OK:
            raise OptOpsError(f"the engine cannot answer: {clean(str(said), 500)}", self._where)

    def require_alive(self) -> None:
        """Check that it runs.

        Raises:
            OptOpsError: it ended.
        """
        if not self.alive:
            raise OptOpsError(f"the engine {self.kind} ended", self._where)

    def wait(self) -> None:
        """Wait until it ends, which it does not do by itself.

        Raises:
            OptOpsError: it ended.
        """
        self._guard.wait()
        self.require_alive()

    @property
    def _where(self) -> str:
        return f"its last lines are above, and all are in {self.log}"

    def last_lines(self) -> list[str]:
        """The first error that it printed, of which the end may say nothing, and the end."""
        lines = [each for each in self.log.read_text("utf-8", "replace").splitlines() if each.strip()]
        first = [each for each in lines[:-_LAST_LINES] if _ERROR.search(each)][:1]
        return first + lines[-_LAST_LINES:]

    def open(
        self, request: Mapping[str, Any], seconds: float | None, client: socket.socket | None = None
    ) -> http.client.HTTPResponse:
        """Send a checked request. The answer is closed by the caller.

        Args:
            request: as `keys.checked` returns it.
            seconds: that the engine may be silent; None: for ever.
            client: who asked. If it leaves before the engine answers, the request is given up.

        Raises:
            OSError: it does not answer, or the client left. `TimeoutError`: not in time.
        """
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=seconds)
        body = json.dumps(self._translated(request)).encode()
        headers = {"Content-Type": "application/json", "Connection": "close", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", "/v1/completions", body, headers)
            if client is not None:
                _wait_unless_left(connection.sock, client, seconds)
            return connection.getresponse()
        except BaseException:
            connection.close()  # by that the engine knows
            raise

    def answer(
        self, request: Mapping[str, Any], seconds: float | None, client: socket.socket | None = None
    ) -> tuple[int, Any]:
        """The status, and the JSON object of the answer, or what the engine said instead. The rest as `open`.

        Raises:
            OSError: it does not answer, or the client left. `TimeoutError`: not in time.
        """
        with self.open(request, seconds, client) as response:
            text = response.read().decode("utf-8", "replace")
        with suppress(ValueError):
            return response.status, json.loads(text)
        return response.status, text

    @contextmanager
    def turn(self, seconds: float) -> Iterator[None]:
        """Alone with transformers: it generates one after the other, with one seed for all. vLLM takes all at once.

        Args:
            seconds: to wait for the turn.

        Raises:
            TimeoutError: it did not come.
        """
        if self.kind != "transformers":
            yield
            return
        if not self._turn.acquire(timeout=max(0.0, seconds)):
            raise TimeoutError
        try:
            yield
        finally:
            self._turn.release()

    def settle(self) -> None:
        """Wait until transformers is idle after a request that was given up, which may still draw."""
        if self.kind == "transformers":
            with suppress(OSError):  # then it is dead, and the command ends
                self.answer(_TINY, None)

    def close(self) -> None:
        """End its process group."""
        if self._guard.stdin:
            self._guard.stdin.close()
        try:
            self._guard.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()

    def _translated(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request in the engine's words.

        transformers 5.23 leaves `temperature` and `top_p` unused unless the generation config says `do_sample`. Then it
        draws from the 50 likeliest tokens alone, unless that says otherwise.
        """
        if self.kind == "vllm":  # it takes no empty text, but a list with one
            return {**request, "model": self.model.name, "prompt": request["prompt"] or [""]}
        drawing = {"do_sample": False}
        if request["temperature"] > 0:
            drawing = {"do_sample": True, "top_k": 0, "temperature": request["temperature"], "top_p": request["top_p"]}
        passed = {key: request[key] for key in ("prompt", "max_tokens", "stop", "seed", "stream") if key in request}
        return {**passed, "model": self._folder.name, "generation_config": json.dumps(drawing)}

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _wait_unless_left(engine: socket.socket, client: socket.socket, seconds: float | None) -> None:
    """Wait until there is something to read from the engine."""
    watched = [engine, client]
    while engine not in (ready := select.select(watched, [], [], seconds)[0]):
        if not ready:
            raise TimeoutError
        if not client.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client left")
        watched = [engine]  # the client sent more than its request, which nobody reads


class TokenCounter:
    """Tokens of texts, counted by `python -m trainer.tokens.count`.

    Args:
        python: what stands before `-m trainer`.
        variables: of the trainer's environment.
        tokenizer: tokenizer.json.
    """

    def __init__(self, python: Sequence[str], variables: Mapping[str, str], tokenizer: Path) -> None:
        self._lock = Lock()
        self._process = subprocess.Popen(
            [*python, "-m", "trainer.tokens.count", str(tokenizer)],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text.

        Raises:
            OptOpsError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock, suppress(OSError):
            self._process.stdin.write(json.dumps(list(texts)).encode() + b"\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        raise OptOpsError("tokens cannot be counted: python -m trainer.tokens.count ended", "opt-ops doctor")

    def close(self) -> None:
        """End it, and what it has started."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=_LEAVE_SECONDS)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
