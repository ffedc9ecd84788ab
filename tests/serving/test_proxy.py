"""What the proxy does with clients, without an engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from opt_ops.serving import engine
from opt_ops.serving.listener import Listener
from opt_ops.serving.page import Page
from opt_ops.serving.proxy import Handler
from tests.e2e.site import PATIENCE, until
from tests.node.test_agent import alive


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


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener("127.0.0.1", 0, Handler, "") as listener:
        about = {"name": "1.00/6", "run": "1.00", "step": 6, "engine": "vllm", "positions": 64, "tokens": 9}
        listener.page = Page({**about, "remark": "", "token_needed": False})
        listener.server_activate()
        Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        yield listener
        listener.shutdown()


def answer(listener: Listener, said: str, *, ends: bool = False) -> str:
    """All that comes back; `ends`: the client sends no more."""
    with socket.create_connection(listener.server_address[:2], timeout=PATIENCE) as client:  # pyright: ignore[reportArgumentType]
        client.sendall(said.encode().replace(b"\n", b"\r\n"))
        if ends:
            client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        ("PUT / HTTP/1.1\nHost: localhost\n\n", 501, "Unsupported method ('PUT')"),
        ("OPTIONS /v1/completions HTTP/1.1\nHost: localhost\n\n", 501, "Unsupported method ('OPTIONS')"),
        (f"GET /{'a' * 70_000} HTTP/1.1\n\n", 414, "Too Long"),
        ("GET /../../etc/passwd HTTP/1.1\nHost: localhost\n\n", 404, "there are /, /health"),
        ("GET / HTTP/1.1\nHost: evil.example\n\n", 403, "of this machine"),
        ("POST /v1/completions HTTP/1.1\nHost: localhost\n\n", 411, "Content-Length is wanted"),
        ("POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: -1\n\n", 411, "Content-Length is wanted"),
        (f"POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: {'9' * 5000}\n\n", 413, "at most 1,000,000"),
        (
            "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Length: 99\n\n" + '{"prompt": "a"}',
            400,
            "the body ended after 15 of 99 bytes",
        ),
    ],
)
def test_what_is_no_request_is_refused_in_one_form(listener: Listener, said: str, status: int, why: str):
    head, _, body = answer(listener, said, ends=True).partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert "Content-Type: application/json" in head
    assert "Content-Security-Policy: default-src 'none'" in head
    assert why in json.loads(body)["error"]["message"]


def test_a_body_that_is_too_long_need_not_be_sent(listener: Listener):
    asked = "POST /v1/completions HTTP/1.1\nHost: localhost\nExpect: 100-continue\nContent-Length: 1000001\n\n"
    assert answer(listener, asked).startswith("HTTP/1.1 413 ")


def test_the_head_of_the_page_has_no_body(listener: Listener):
    head, _, body = answer(listener, "HEAD / HTTP/1.1\nHost: LOCALHOST:80\n\n").partition("\r\n\r\n")
    assert (head.startswith("HTTP/1.1 200 "), body) == (True, "")
    assert answer(listener, "GET / HTTP/1.1\nHost: localhost\n\n").startswith(f"{head}\r\n\r\n<!doctype html>")


def test_connections_for_which_no_thread_could_be_started_keep_no_place(monkeypatch: pytest.MonkeyPatch):
    def fails(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Listener("127.0.0.1", 0, Handler, "secret") as listener, monkeypatch.context() as patch:
        patch.setattr(Thread, "start", fails)
        for _ in range(1000):
            with pytest.raises(RuntimeError):
                listener.process_request(None, None)


def test_a_token_counter_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "_LEAVE_SECONDS", 0.1)
    pid = tmp_path / "pid"
    hangs = f"sleep 600 & echo $! > {pid}.new; mv {pid}.new {pid}; while read line; do echo '[1]'; done; sleep 600"
    counter = engine.TokenCounter(["sh", "-c", hangs], {}, tmp_path / "tokenizer.json")
    assert counter(["a"]) == [1]
    counter.close()
    until(lambda: not alive(int(pid.read_text())))
