"""What the proxy does with clients, without an engine."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from threading import Thread

import pytest

from opt_ops.serving.listener import Listener
from opt_ops.serving.proxy import Handler
from tests.e2e.site import PATIENCE


class Impatient(Handler):
    reading_seconds = 0.3


@pytest.mark.parametrize("head", [b"GET /", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n"])
def test_a_client_that_sends_byte_by_byte_does_not_keep_its_place(head: bytes):
    with Listener("127.0.0.1", 0, Impatient, "secret") as listener:
        listener.server_activate()
        Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        with socket.create_connection(listener.server_address[:2], timeout=PATIENCE) as client:  # pyright: ignore[reportArgumentType]
            client.sendall(head)
            client.setblocking(False)
            until, closed = time.monotonic() + PATIENCE, False
            while not closed:
                assert time.monotonic() < until, "it is still read"
                time.sleep(0.02)  # each byte comes long before a silent client is given up
                try:
                    client.send(b"a")
                    with suppress(BlockingIOError):
                        closed = client.recv(1000) == b""
                except OSError:
                    closed = True
        listener.shutdown()
