"""`ckpt serve` with a program that speaks vLLM's interface: what is passed on, limits, tokens, and how all of it ends.

vLLM itself, which takes minutes to start, is run by test_serve_real_vllm.py.
"""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from opt_ops.serving.engine import Engine
from opt_ops.serving.keys import Model
from opt_ops.serving.listener import AT_ONCE, Listener
from opt_ops.serving.page import Page
from opt_ops.serving.proxy import MOST_BYTES, Handler
from tests.e2e.serving import Served
from tests.e2e.site import PATIENCE, Site, until
from tests.serving.vllm_stand_in import program


def configured(site: Site, folder: Path, serve: str) -> str:
    """A configuration beside the site's own, with this table."""
    (folder / "opt-ops.toml").write_text(
        (site.folder / "opt-ops.toml").read_text().replace("playbooks = ", "# ") + f"\n[serve]\n{serve}\n"
    )
    file = folder / "opt-ops.toml"
    file.write_text(f"runs = '{site.runs}'\n{file.read_text()}")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained_site: Site) -> Path:
    """With the program, the configuration, and what the program has seen."""
    folder = tmp_path_factory.mktemp("vllm")
    program(folder)
    configured(trained_site, folder, 'vllm = "./vllm"')
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    served = Served(folder, "1/12", "--port", "0", VLLM_API_KEY="of another server")
    yield served
    served.close()


def requests(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def test_vllm_is_started_with_what_it_documents(served: Served, folder: Path, trained_site: Site):
    assert served.item["engine"] == "vllm", "it is configured, so it is the default"
    serve, model, host, port, name, positions, dtype = json.loads((folder / "command.json").read_text())
    assert (serve, host, name, positions, dtype) == ("serve", "127.0.0.1", "1.00/12", "64", "float32")
    assert Path(model).parent == trained_site.runs / "1" / "converted"
    assert served.listening() == {("127.0.0.1", int(port)), ("127.0.0.1", int(served.url.rpartition(":")[2]))}


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"prompt": ["a", "b"], "n": 2}, ["a!", "a!", "b!", "b!"]),
        ({"prompt": [5, 6]}, ["[5, 6]!"]),
        ({"prompt": "a", "echo": True, "logprobs": 3, "max_tokens": 0}, ["a!"]),
        ({"prompt": "a", "stop": ["x"], "seed": 7, "top_p": 0.5, "temperature": 2}, ["a!"]),
    ],
)
def test_all_keys_reach_vllm(served: Served, folder: Path, body: Any, texts: list[str]):
    status, answer = served.ask(**body)
    assert status == 200, answer
    assert [each["text"] for each in answer["choices"]] == texts
    assert answer["model"] == "1.00/12"
    defaults = {"model": "1.00/12", "max_tokens": 16, "temperature": 1.0, "top_p": 1.0}
    assert requests(folder)[-1] == defaults | body


def test_a_stream_of_several_is_passed_on(served: Served):
    events = served.events(prompt="a", n=2)
    assert [each["choices"][0]["index"] for each in events] == [0, 1]


def test_what_vllm_says_is_told(served: Served):
    assert served.ask(prompt="refuse")[1]["error"]["message"] == "the engine refuses this: too hard"
    status, answer = served.ask(prompt="break")
    assert (status, answer["error"]["message"]) == (502, "the engine failed: Internal Server Error")
    status, text = served.send("/v1/completions", {"prompt": "break", "stream": True})
    assert (status, "Internal Server Error" in text) == (502, True)


def test_who_leaves_before_the_answer_gives_up_the_place(served: Served, folder: Path):
    before, body = len(requests(folder)), json.dumps({"prompt": "wait"})
    clients = [http.client.HTTPConnection(served.url.removeprefix("http://")) for _ in range(AT_ONCE)]
    for client in clients:
        client.request("POST", "/v1/completions", body)
    until(lambda: len(requests(folder)) == before + AT_ONCE)
    for client in clients:
        client.close()
    until(lambda: served.ask(prompt="a")[0] == 200)


def test_eight_requests_at_once_and_no_more(served: Served, folder: Path):
    before = len(requests(folder))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(served.ask, prompt="wait") for _ in range(AT_ONCE)]
        until(lambda: len(requests(folder)) == before + AT_ONCE)
        status, answer = served.ask(prompt="a")
        assert (status, "8 requests are open" in answer["error"]["message"]) == (429, True)
        assert served.send("/health")[0] == 200
        (folder / "go").touch()
        assert {each.result()[0] for each in waiting} == {200}
    assert served.ask(prompt="a")[0] == 200


def test_a_body_has_at_most_a_megabyte(served: Served):
    frame = len(json.dumps({"prompt": ""}))
    status, answer = served.ask(prompt="a" * (MOST_BYTES - frame))
    assert (status, answer["error"]["param"]) == (400, "prompt"), "it was read: it is too long for the model"
    assert served.ask(prompt="a" * (MOST_BYTES - frame + 1))[0] == 413
    assert served.ask(prompt="a" * 5 * MOST_BYTES)[0] == 413


@pytest.mark.parametrize("body", [b"[", b"[]", b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","top_p":NaN}', b"\xff"])
def test_a_body_that_is_no_object_is_refused(served: Served, body: bytes):
    assert served.send("/v1/completions", body)[0] == 400


def test_there_is_a_time_limit(folder: Path, tmp_path: Path, trained_site: Site):
    """The same server with a limit of half a second instead of ten minutes."""
    (folder / "go").unlink(missing_ok=True)
    (converted,) = (trained_site.runs / "1" / "converted").glob("*-fp32")
    model = Model(name="1.00/12", positions=64, vocabulary=2048)
    engine = Engine("vllm", str(folder / "vllm"), converted, model, "fp32", tmp_path / "log")
    try:
        engine.wait_ready()
        with Listener("127.0.0.1", 0, Handler, "", seconds=0.5) as listener:
            listener.engine, listener.count, listener.about = engine, lambda texts: [1] * len(texts), {}
            listener.server_activate()
            Thread(target=listener.serve_forever, daemon=True).start()
            late = Served.__new__(Served)
            late.url = listener.url
            status, answer = late.ask(prompt="wait")
            assert (status, answer["error"]["message"]) == (504, "no answer within 0.5 s")
            listener.shutdown()
    finally:
        (folder / "go").touch()
        engine.close()


def test_with_a_token_nobody_else_is_answered(folder: Path):
    served = Served(folder, "1/12", "--port", "0", OPT_OPS_SERVE_TOKEN="ab cd")
    try:
        assert served.ask(prompt="a")[0] == 401
        assert served.send("/v1/models", Authorization="Bearer ab")[0] == 401
        assert served.send("/v1/completions", {"prompt": "a"}, Authorization="Bearer ab cd", Host="node7")[0] == 200
        assert 'id="token"' in served.send("/")[1]
        assert "ab cd" not in served.send("/")[1]
    finally:
        assert served.end(signal.SIGTERM) == 0


def test_kill_9_of_the_command_leaves_nothing_behind(folder: Path):
    served = Served(folder, "1/12", "--port", "0")
    assert any("time.sleep(3600)" in " ".join(each.cmdline()) for each in served.all), "a child of the engine"
    served.process.kill()
    served.process.wait()
    until(served.all_ended)
    served.close()


def test_an_engine_that_ends_ends_the_command(folder: Path):
    served = Served(folder, "1/12", "--port", "0")
    assert served.ask(prompt="die")[0] == 502, "who waits is told, although the command ends as well"
    assert served.process.wait(PATIENCE) == 1
    until(served.all_ended)
    said = served.errors.read_text()
    assert "the engine vllm ended" in said
    assert "stand-in: out of memory" in said
    served.close()


def test_a_port_in_use_is_refused(served: Served, trained_site: Site, folder: Path):
    port = served.url.rpartition(":")[2]
    said = trained_site.command("-c", str(folder / "opt-ops.toml"), "ckpt", "serve", "1/12", "--port", port, code=4)
    assert "in use" in said


def test_other_machines_need_a_token(trained_site: Site, folder: Path):
    words = ("-c", str(folder / "opt-ops.toml"), "ckpt", "serve", "1/12", "--port", "0", "--host", "0.0.0.0")
    assert "OPT_OPS_SERVE_TOKEN" in trained_site.command(*words, code=2)


@pytest.mark.parametrize(
    ("serve", "engine", "said"),
    [
        ("", "vllm", "[serve] vllm names no program"),
        ('vllm = "/nowhere/vllm"', "vllm", "there is no such program"),
        ('python = "/nowhere/python"', "transformers", "make serve-env"),
        ('python = "./bare/bin/python"', "transformers", "pip install 'opt-ops[serve]'"),
    ],
)
def test_an_engine_that_is_not_there_is_a_usage_error(
    trained_site: Site, tmp_path: Path, serve: str, engine: str, said: str
):
    import venv

    if "bare" in serve:
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    file = configured(trained_site, tmp_path, serve)
    assert said in trained_site.command("-c", file, "ckpt", "serve", "1/12", "--engine", engine, code=2)


def test_a_checkpoint_that_does_not_count_is_marked_on_the_page():
    about = {"name": "1.00/6", "run": "1.00", "step": 6, "engine": "vllm", "positions": 64, "tokens": 9}
    page = Page({**about, "remark": "A rollback <discarded> it.", "token_needed": False}).body.decode()
    assert '<p class="remark">A rollback &lt;discarded&gt; it.</p>' in page
    assert 'class="remark"' not in Page({**about, "remark": "", "token_needed": False}).body.decode()
