"""The socket of the server, and how much it takes at once."""

from __future__ import annotations

import ipaddress
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from threading import BoundedSemaphore
from typing import Any

from opt_ops.serving.engine import Engine
from opt_ops.serving.page import Page

AT_ONCE = 8  # requests
_CONNECTIONS = 64
_REQUEST_SECONDS = 600.0
_LAST_SECONDS = 2.0


class Listener(socketserver.ThreadingTCPServer):
    """It holds its address from the beginning, and listens after `server_activate`. Its attributes are set before that.

    Args:
        host, port: of this machine; port 0 is any free one.
        handler: answers a request.
        token: that requests must show, as `Authorization: Bearer`; empty: none.
        seconds: for each request.

    Raises:
        OSError: there is no such host, or the address is in use, or not of this machine.
    """

    daemon_threads = allow_reuse_address = True
    engine: Engine
    count: Callable[[Sequence[str]], Sequence[int]]
    page: Page
    about: Mapping[str, Any]  # what `/v1/models` says of the one model

    def __init__(
        self,
        host: str,
        port: int,
        handler: type[BaseHTTPRequestHandler],
        token: str,
        seconds: float = _REQUEST_SECONDS,
    ) -> None:
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.token, self.seconds = token, seconds
        self.slots, self._connections = BoundedSemaphore(AT_ONCE), BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, handler, bind_and_activate=False)  # pyright: ignore[reportArgumentType]
        try:
            self.server_bind()
        except OSError:
            self.server_close()
            raise

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """Its address."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, unless there are too many connections already."""
        if not self._connections.acquire(blocking=False):
            super().shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, in the thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def server_close(self) -> None:
        """Stop listening. The engine has ended: open requests are told so at once, and that is waited for."""
        super().server_close()
        deadline = time.monotonic() + _LAST_SECONDS
        for _ in range(AT_ONCE):
            self.slots.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong, unless the client left."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)
