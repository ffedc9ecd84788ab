"""The server that people meet: one page, and `/v1/completions` with exactly the keys that the engine honours."""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from socket import SHUT_RDWR
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

from opt_ops.core.text import clean
from opt_ops.errors import OptOpsError
from opt_ops.serving.answers import DONE, Chunks, completion, error
from opt_ops.serving.keys import Refused, checked, decoded
from opt_ops.serving.listener import AT_ONCE, Listener

MOST_BYTES = 10**6  # of a body
_MOST_DRAINED = 16 * MOST_BYTES  # of a body that is too long, so that its sender reads why
_TOO_LONG = f"a body has at most {MOST_BYTES:,} bytes"
_LONGEST_ERROR = 200
_SILENT_SECONDS = 30.0  # of a client that sends nothing, or takes nothing
_HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)  # also through a tunnel of SSH


class Handler(BaseHTTPRequestHandler):
    """One request on one connection."""

    server: Listener  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = _SILENT_SECONDS
    reading_seconds = 60.0  # for all of a request: one that comes byte by byte must not keep its place
    protocol_version, server_version, sys_version = "HTTP/1.1", "opt-ops", ""
    begun = False

    def setup(self) -> None:
        """Begin to wait for the request."""
        super().setup()
        self._late = Timer(self.reading_seconds, self._hang_up)
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        """The connection is over."""
        self._late.cancel()
        super().finish()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name in the base class)
        """Requests are not logged: prompts are their authors' business."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What the base class refuses: bad syntax, other methods. In our form, not as its HTML."""
        self._send(code, error(clean(message or HTTPStatus(code).phrase, _LONGEST_ERROR)))

    def handle_expect_100(self) -> bool:
        """Whether the client shall send the body that it asks about."""
        with suppress(Refused):
            if self._length() > MOST_BYTES:
                self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TOO_LONG)
                return False
        return super().handle_expect_100()

    def do_GET(self) -> None:
        """The page, whether the engine runs, and the model."""
        self._late.cancel()
        path, server = urlsplit(self.path).path, self.server
        if path == "/":
            if server.token or self._admitted():
                self._send(HTTPStatus.OK, server.page.body, "text/html; charset=utf-8", server.page.policy)
        elif path == "/health":
            alive = server.engine.alive
            self._send(HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE, {"alive": alive})
        elif path == "/v1/models":
            if self._admitted():
                self._send(HTTPStatus.OK, {"object": "list", "data": [server.about]})
        else:
            self._send(HTTPStatus.NOT_FOUND, error(f"{path}: there are /, /health, /v1/models and /v1/completions"))

    do_HEAD = do_GET  # noqa: N815  (its name in the base class)

    def do_POST(self) -> None:
        """A completion."""
        try:
            body = self._body()  # it is read before any answer: else the connection would break
            self._late.cancel()
            self._completion(body)
        except Refused as refused:
            self._send(refused.status, error(str(refused), refused.param))
        except TimeoutError:
            self._send(HTTPStatus.GATEWAY_TIMEOUT, error("it took too long; docs/serving.md has the limits"))
        except OptOpsError as ended:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, error(str(ended)))

    def _completion(self, body: bytes) -> None:
        server, deadline = self.server, time.monotonic() + self.server.seconds
        if urlsplit(self.path).path != "/v1/completions":
            raise Refused(f"{self.path}: only /v1/completions is served", status=HTTPStatus.NOT_FOUND)
        if not self._admitted():
            return
        if not server.slots.acquire(blocking=False):
            raise Refused(f"{AT_ONCE} requests are open already; try again", status=HTTPStatus.TOO_MANY_REQUESTS)
        try:
            request = checked(decoded(body), server.engine.kind, server.engine.model, server.count)
            with server.engine.turn(deadline - time.monotonic()):
                self._complete(request, deadline)
        finally:
            server.slots.release()

    def _complete(self, request: Mapping[str, Any], deadline: float) -> None:
        try:
            if request.get("stream"):
                self._stream(request, deadline)
            else:
                left = max(1.0, deadline - time.monotonic())
                answer = self.server.engine.answer(request, left, self.connection)
                self._send(*completion(*answer, request, self.server.engine.kind))
        except (OSError, HTTPException, ValueError, LookupError) as failed:  # of the engine, or the client left
            late = isinstance(failed, TimeoutError)
            said = error(f"no answer within {self.server.seconds:g} s" if late else f"the engine failed: {failed}")
            with suppress(OSError):
                if self.begun:
                    self._event(json.dumps(said))
                else:
                    self._send(HTTPStatus.GATEWAY_TIMEOUT if late else HTTPStatus.BAD_GATEWAY, said)
            self.server.engine.settle()

    def _stream(self, request: Mapping[str, Any], deadline: float) -> None:
        kind = self.server.engine.kind
        with self.server.engine.open(request, max(1.0, deadline - time.monotonic()), self.connection) as response:
            if response.status != HTTPStatus.OK:
                self._send(*completion(response.status, response.read().decode("utf-8", "replace"), request, kind))
                return
            self._head(HTTPStatus.OK, {"Content-Type": "text/event-stream"})
            chunks = Chunks(request, kind)
            for line in response:
                if time.monotonic() > deadline:
                    raise TimeoutError
                for data in chunks.of(line):
                    self._event(data)
        self._event(DONE)

    def _body(self) -> bytes:
        length = self._length()
        if length > MOST_BYTES:
            for _ in range(min(length, _MOST_DRAINED) // 1000):
                self.rfile.read(1000)
            raise Refused(_TOO_LONG, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(f"the body ended after {len(body):,} of {length:,} bytes")
        return body

    def _length(self) -> int:
        """Of the body, as the client says."""
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit()):
            raise Refused("Content-Length is wanted", status=HTTPStatus.LENGTH_REQUIRED)
        return int(text[:20])

    def _admitted(self) -> bool:
        """Whether the client has the token; without one, whether it is on this machine and no page of another site."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if token := self.server.token:
            shown = self.headers.get("Authorization", "")
            fits = hmac.compare_digest(shown.encode("utf-8", "replace"), f"Bearer {token}".encode())
            why, status = "Authorization: Bearer $OPT_OPS_SERVE_TOKEN is wanted", HTTPStatus.UNAUTHORIZED
        else:
            fits = bool(_HERE.fullmatch(host)) and origin in (None, f"http://{host}")
            why, status = "only programs and pages of this machine are answered", HTTPStatus.FORBIDDEN
        if not fits:
            self._send(status, error(why))
        return fits

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _send(self, status: int, body: Any, kind: str = "application/json", policy: str = "default-src 'none'") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": policy})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.begun = self.close_connection = True
        self.send_response(status)
        safe = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Connection": "close"}
        for name, value in {**headers, **safe}.items():
            self.send_header(name, value)
        self.end_headers()
