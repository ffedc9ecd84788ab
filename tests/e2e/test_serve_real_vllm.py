"""`ckpt serve` with the real vLLM: every key of its table, tokens, addresses, and how all of it ends.

`TEST_VLLM` names its program. It has an environment of its own and starts in minutes: docs/serving.md.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.state.status import Status
from tests.e2e.serving import Served
from tests.e2e.site import Site, until
from tests.e2e.test_serve import PROMPTS, TOKENS, generated

PROGRAM = os.environ.get("TEST_VLLM", "")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not PROGRAM, reason="TEST_VLLM names no program of vLLM"),
]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; on a CPU it takes 92% of the memory by itself
SETTINGS = (
    *("steps=40", "checkpoint_every=40", "evaluate_every=100", "peer_copies.every=0", "optim.warmup_steps=4"),
    *("model.num_layers=2", "model.init_std=0.3"),
)


def trained(folder: Path, heads: int) -> Site:
    """A site with one lineage of 128 channels, trained for 40 steps."""
    site = Site(folder, f"[serve]\nvllm = '{PROGRAM}'", trainer=f"'{sys.executable}', '-m', 'trainer'")
    words = [f"--set={each}" for each in (*SETTINGS, f"model.num_heads={heads}")]
    site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
    try:
        site.start_daemon()
        assert site.ended().status is Status.COMPLETED
    finally:
        site.close()
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return trained(tmp_path_factory.mktemp("vllm"), heads=2)


@pytest.fixture(scope="module")
def served(site: Site) -> Iterator[Served]:
    served = Served(site.folder, "1/40", "--port", "0", **SMALL)
    yield served
    served.close()


@pytest.fixture(scope="module")
def model(served: Served, site: Site) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (folder,) = (site.runs / "1" / "converted").glob("*-fp32")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_greedy_answers_are_those_of_generate(served: Served, model: tuple[Any, Any]):
    """Token by token, with one `</s>` in front; in one request with all prompts, too."""
    expected = [generated(model, prompt, do_sample=False) for prompt in PROMPTS]
    seen = []
    for prompt in PROMPTS:
        status, answer = served.ask(prompt=prompt, temperature=0, max_tokens=TOKENS)
        assert status == 200, answer
        usage = answer["usage"]
        seen.append((answer["choices"][0]["text"], usage["completion_tokens"], usage["prompt_tokens"]))
    assert seen == expected
    assert len({text for text, _, _ in seen}) > len(PROMPTS) / 2, "answers that depend on the prompt"
    _, answer = served.ask(prompt=PROMPTS, temperature=0, max_tokens=TOKENS)
    assert [each["text"] for each in answer["choices"]] == [text for text, _, _ in expected]


def test_token_ids_are_taken_as_they_are(served: Served, model: tuple[Any, Any]):
    ids = [model[1](prompt)["input_ids"] for prompt in PROMPTS[:4]]
    texts = [generated(model, prompt, do_sample=False)[0] for prompt in PROMPTS[:4]]
    assert served.text(prompt=ids[0], temperature=0, max_tokens=TOKENS) == texts[0]
    _, answer = served.ask(prompt=ids, temperature=0, max_tokens=TOKENS)
    assert [each["text"] for each in answer["choices"]] == texts


def test_log_probabilities_of_a_prompt_are_those_of_the_model(served: Served, model: tuple[Any, Any]):
    import torch

    network, tokenizer = model
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        scores = torch.log_softmax(network(ids).logits[0].float(), -1)
    expected = [scores[at, token].item() for at, token in enumerate(ids[0, 1:])]
    status, answer = served.ask(prompt="The quick brown fox", echo=True, logprobs=2, max_tokens=0)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["text"].removeprefix("</s>") == "The quick brown fox"
    first, *found = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert found == pytest.approx(expected, abs=1e-4)
    _, answer = served.ask(prompt="The quick", logprobs=3, max_tokens=4, temperature=0)
    said = answer["choices"][0]["logprobs"]
    assert [max(each.values()) for each in said["top_logprobs"]] == said["token_logprobs"], "greedy takes the best"


def test_what_is_drawn_depends_on_seed_temperature_and_top_p(served: Served):
    how = {"prompt": "The quick", "max_tokens": TOKENS, "temperature": 1.5}
    drawn = [served.text(**how, seed=seed) for seed in (1, 2, 3, 1, 2, 3)]
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) == 3
    _, answer = served.ask(**how, n=3, seed=0)
    assert (len(answer["choices"]), len({each["text"] for each in answer["choices"]})) == (3, 3)
    likeliest = served.text(**{**how, "temperature": 0})
    assert served.text(**how, top_p=1e-6) == likeliest
    assert served.text(**{**how, "temperature": 0.01}, seed=5) == likeliest


def test_an_answer_ends_before_its_stop_text_and_a_stream_has_the_same(served: Served):
    whole = served.text(prompt="import os", temperature=0, max_tokens=TOKENS)
    stop = whole[len(whole) // 2 :][:3]
    for body, text in (({}, whole), ({"stop": ["never seen", stop]}, whole[: whole.index(stop)])):
        how = {"prompt": "import os", "temperature": 0, "max_tokens": TOKENS, **body}
        assert served.text(**how) == text
        events = served.events(**how, logprobs=1)
        choices = [each["choices"][0] for each in events]
        assert "".join(each["text"] for each in choices) == text
        assert choices[-1]["finish_reason"] == ("stop" if body else "length")
        tokens = [token for each in choices if each["logprobs"] for token in each["logprobs"]["tokens"]]
        assert len(tokens) == TOKENS or body, "each token has its log-probability"
    events = served.events(prompt=["a", "b"], n=2, max_tokens=3, echo=True)
    assert {each["choices"][0]["index"] for each in events} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": 64}, "at most 62 fit"),
        ({"prompt": [2048]}, "token ids are below 2048"),
        ({"best_of": 2}, "this key is not served"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling"),
    ],
)
def test_what_cannot_be_answered_is_400(served: Served, body: dict[str, Any], said: str):
    status, answer = served.ask(**{"prompt": "a", **body})
    assert (status, said in answer["error"]["message"]) == (400, True), answer


def test_the_last_position_can_be_used(served: Served):
    status, answer = served.ask(prompt="a", max_tokens=62, temperature=0)
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 2), answer


def test_a_client_that_leaves_disturbs_nobody(served: Served):
    body = json.dumps({"prompt": ["a"] * 50, "stream": True, "max_tokens": 60})
    for _ in range(9):
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().readline()
        connection.close()
    until(lambda: served.ask(prompt="a", max_tokens=1)[0] == 200)


def test_all_its_processes_listen_on_the_loopback_alone(served: Served):
    assert {host for host, _ in served.listening()} == {"127.0.0.1"}


def test_kill_9_of_the_command_leaves_nothing_behind(served: Served):
    assert len(served.all) > 4, "the command, the guard, vLLM's server and its engine"
    served.process.kill()
    served.process.wait()
    until(served.all_ended)


def test_ctrl_c_ends_all_processes(site: Site):
    assert Served(site.folder, "1/40", "--port", "0", **SMALL).end(signal.SIGINT) == 0


def test_a_head_size_that_it_refuses_is_told_before_it_starts(tmp_path: Path):
    said = trained(tmp_path, heads=8).command("ckpt", "serve", "1/40", "--port", "0", code=2)
    assert "head size 16" in said
    assert "Starting" not in said
