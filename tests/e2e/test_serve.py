"""`ckpt serve` with the real `transformers serve`, on a checkpoint that the real trainer has trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chronicles.conftest import browser  # noqa: F401  (a fixture)
from tests.e2e.serving import Served
from tests.e2e.site import Site, until

PROMPTS = [
    *("The quick brown fox", "class Point:", "def run(self", "import os", "Return the", "if x is", "", "The file"),
    *("a b c", "numbers 1 2", "größer", "日本", "  two spaces", "a\nb", "raise ValueError(", "for each in", "</s>"),
    *("True", "'quoted'", "the the the the the the the the the the"),
]
TOKENS = 12
DAMAGED = "The checkpoint of step 6 is damaged"


@pytest.fixture(scope="module")
def served(trained_site: Site) -> Iterator[Served]:
    served = Served(trained_site.folder, "1/12", "--port", "0")
    yield served
    served.close()


@pytest.fixture(scope="module")
def model(served: Served, trained_site: Site) -> tuple[Any, Any]:
    """Model and tokenizer of the converted checkpoint, in transformers itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = (trained_site.runs / "1" / "converted").glob("*-fp32")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def generated(model: tuple[Any, Any], prompt: str, **how: Any) -> tuple[str, int, int]:
    """Text, and tokens of answer and prompt."""
    network, tokenizer = model
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = network.generate(**inputs, max_new_tokens=TOKENS, **how)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids), inputs.input_ids.shape[1]


def test_greedy_answers_are_those_of_generate(served: Served, model: tuple[Any, Any]):
    """Token by token: as many, and the same text."""
    seen = []
    for prompt in PROMPTS:
        status, answer = served.ask(prompt=prompt, temperature=0, max_tokens=TOKENS)
        assert status == 200, answer
        usage = answer["usage"]
        seen.append((answer["choices"][0]["text"], usage["completion_tokens"], usage["prompt_tokens"]))
    assert seen == [generated(model, prompt, do_sample=False) for prompt in PROMPTS]
    assert len({text for text, _, _ in seen}) > len(PROMPTS) / 2, "answers that depend on the prompt"
    assert model[1]("The quick")["input_ids"][0] == 2, "</s> is in front, as in training"


def test_tokens_are_counted_as_the_model_reads_them(served: Served, model: tuple[Any, Any]):
    for prompt in PROMPTS:
        count = len(model[1](prompt)["input_ids"])
        status, answer = served.ask(prompt=prompt, max_tokens=64 - count + 1)
        assert (status, f"the prompt has {count} tokens" in answer["error"]["message"]) == (400, True), answer


def test_drawn_answers_are_those_of_generate_also_at_once(served: Served, model: tuple[Any, Any]):
    """By itself transformers ignores a temperature, draws from the 50 likeliest tokens, and has one seed for all."""
    import torch

    how = {"temperature": 1.3, "top_p": 0.95}

    def expected(seed: int) -> str:
        torch.manual_seed(seed)
        return generated(model, "The quick", do_sample=True, top_k=0, **how)[0]

    def asked(seed: int) -> str:
        return served.text(prompt="The quick", seed=seed, max_tokens=TOKENS, **how)

    seeds = range(6)
    with ThreadPoolExecutor(len(seeds)) as pool:
        at_once = list(pool.map(asked, seeds))
    assert at_once == [expected(seed) for seed in seeds]
    assert len(set(at_once)) == len(seeds)


def test_a_stream_has_the_same_text(served: Served):
    counts = []
    for prompt in PROMPTS[1:5]:
        whole = served.text(prompt=prompt, temperature=0, max_tokens=TOKENS)
        events = served.events(prompt=prompt, temperature=0, max_tokens=TOKENS)
        assert "".join(each["choices"][0]["text"] for each in events) == whole.rstrip("�")
        assert {each["model"] for each in events} == {"1.00/12"}
        counts.append(len(events))
    assert max(counts) > 3, "it comes in pieces"


def test_an_answer_ends_before_its_stop_text(served: Served):
    whole = served.text(prompt="import os", temperature=0, max_tokens=TOKENS)
    stop = whole[len(whole) // 2 :][:3]
    for body in ({"stop": stop}, {"stop": ["never seen", stop]}):
        status, answer = served.ask(prompt="import os", temperature=0, max_tokens=TOKENS, **body)
        assert status == 200
        assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"
        events = served.events(prompt="import os", temperature=0, max_tokens=TOKENS, **body)
        assert "".join(each["choices"][0]["text"] for each in events) == whole[: whole.index(stop)]


def test_a_stream_that_is_given_up_disturbs_nobody(served: Served, model: tuple[Any, Any]):
    import http.client

    where = served.url.removeprefix("http://")
    for _ in range(3):
        connection = http.client.HTTPConnection(where)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "a", "stream": True, "max_tokens": 50}))
        answer = connection.getresponse()
        answer.readline()
        answer.close()
        drawn = [served.text(prompt="The quick", seed=5, max_tokens=TOKENS) for _ in range(2)]
        assert drawn[0] == drawn[1]


REFUSED = [
    ({"prompt": "a", "logprobs": 1}, 400, "logprobs", "logprobs: engine transformers ignores it; use --engine vllm"),
    ({"prompt": "a", "best_of": 2}, 400, "best_of", "best_of: this key is not served"),
    ({"prompt": "a", "max_tokens": "8"}, 400, "max_tokens", "max_tokens: must be"),
    ({"prompt": "a", "max_tokens": 64}, 400, "max_tokens", "at most 62 fit"),
    ({"prompt": ["a", "b"]}, 400, "prompt", "one text at a time"),
    ({"prompt": "a", "model": "1.00/6"}, 404, "model", "only 1.00/12"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(served: Served, body: Any, status: int, param: str, message: str):
    code, answer = served.ask(**body)
    assert (code, answer["error"]["param"]) == (status, param)
    assert message in answer["error"]["message"]


def test_the_last_position_can_be_used(served: Served):
    status, answer = served.ask(prompt="a", max_tokens=62, temperature=0)
    assert status == 200
    assert answer["usage"]["total_tokens"] <= 64


def test_it_says_what_it_serves_and_listens_on_the_loopback_alone(served: Served):
    item = served.item
    assert item["schema"] == "opt-ops/ckpt-serve/1"
    assert (item["engine"], item["run"], item["step"]) == ("transformers", "1.00", 12)
    assert item["digest"].startswith("sha256:")
    assert item["pid"] == served.process.pid
    status, text = served.send("/v1/models")
    (about,) = json.loads(text)["data"]
    assert (status, about["id"], about["max_model_len"], about["digest"]) == (200, "1.00/12", 64, item["digest"])
    assert served.send("/health") == (200, '{"alive": true}')
    assert served.send("/v1/chat/completions", {})[0] == 404
    assert {host for host, _ in served.listening()} == {"127.0.0.1"}
    assert served.url == f"http://127.0.0.1:{served.url.rpartition(':')[2]}"


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_pages_of_other_sites_are_not_answered(served: Served, headers: dict[str, str]):
    assert served.send("/v1/completions", {"prompt": "a"}, **headers)[0] == 403


@pytest.mark.browser
def test_the_page_continues_a_text(served: Served, browser: Any):  # noqa: F811
    context = browser.new_context()
    page, asked, wrong = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    answer = page.goto(served.url)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert page.inner_text("h1") == "Run 1.00, step 12"
    assert "1.00/12" in page.title()
    prompt = "<b onmouseover=alert(1)>The quick</b>"
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", str(TOKENS))
    page.fill("#temperature", "0")
    page.click("#go")
    until(lambda: len(page.inner_text("#told")) > 1)  # to wait in the page, Playwright needs what the policy forbids
    expected = served.text(prompt=prompt, temperature=0, max_tokens=TOKENS).rstrip("�")
    assert page.text_content("#answer .prompt") == prompt
    assert page.text_content("#text") == expected
    assert page.locator("#answer b").count() == 0
    page.fill("#max_tokens", "64")
    page.click("#go")
    page.wait_for_selector("#told.wrong")
    assert "at most" in page.inner_text("#told")
    assert all(url.startswith(served.url) for url in asked)
    assert [text for text in wrong if "400 (Bad Request)" not in text] == []
    context.close()


def test_a_damaged_checkpoint_leaves_with_65_before_anything_listens(trained_site: Site):
    said = trained_site.command("ckpt", "serve", "1/6", "--port", "0", code=65)
    assert DAMAGED in said
    assert "http" not in said
    assert "Starting" not in said
    assert len(list((trained_site.runs / "1" / "converted").glob("*-fp32"))) == 1, "nothing of it was converted"


def test_ctrl_c_ends_everything(served: Served):
    """The last test of this module: it ends the server."""
    names = [each.cmdline() for each in served.all]
    assert any("transformers.cli.transformers" in words for words in names)
    assert served.end() == 0
    log = next(Path(word) for word in served.errors.read_text().split() if word.endswith("engine.log"))
    assert not log.parent.exists()
