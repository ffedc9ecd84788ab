"""Which requests are answered, without any engine: each key, each wrong type, the room that is left."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opt_ops.serving.answers import Chunks, completion
from opt_ops.serving.keys import ENGINES, KEYS, Model, Refused, checked, decoded

MODEL = Model(name="12.01/61000", positions=64, vocabulary=100)
WRONG: dict[str, list[Any]] = {
    "model": [1, None],
    "prompt": [None, 1, [], ["a", 1], [1, "a"], [-1], [True], [[]], [[1], "a"], [1.0], "\ud800"],
    "max_tokens": ["8", 8.0, True, None, -1, 0],
    "temperature": ["0", None, True, -0.1, 2.1, [0], 0.0099, 1e-320],
    "top_p": [0, 1.1, "1", None],
    "n": [0, 1.0, "2", True, 129],
    "stop": [None, "", [], [""], ["a"] * 5, "a" * 65, [1], "\udfff"],
    "seed": ["1", 1.5, True, None, 2**63, -1],
    "stream": [1, "true", None],
    "echo": [1, "true", None],
    "logprobs": [True, "1", -1, 21],
}


def ask(body: dict[str, Any], engine: str = "vllm") -> dict[str, Any]:
    """As if each word were a token, with `</s>` in front."""
    return checked(body, engine, MODEL, lambda texts: [1 + len(text.split()) for text in texts])


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_value_of_the_wrong_type_is_refused_with_its_key(key: str, value: Any):
    with pytest.raises(Refused, match=f"^{key}: ") as refused:
        ask({"prompt": "a", key: value})
    assert (refused.value.param, refused.value.status) == (key, 400)


def test_every_key_has_wrong_values_here():
    assert WRONG.keys() == KEYS.keys()


@pytest.mark.parametrize("key", ["best_of", "suffix", "logit_bias", "user", "generation_config", "top_k", "Prompt"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_key_of_no_table_is_refused(key: str, engine: str):
    with pytest.raises(Refused) as refused:
        ask({"prompt": "a", key: 1}, engine)
    assert refused.value.param == key


@pytest.mark.parametrize("key", ["logprobs", "echo", "n"])
def test_what_transformers_would_ignore_is_refused(key: str):
    good = {"logprobs": 1, "echo": True, "n": 1}[key]
    assert ask({"prompt": "a", key: good})[key] == good
    with pytest.raises(Refused, match=f"^{key}: engine transformers ignores it; use --engine vllm$"):
        ask({"prompt": "a", key: good}, "transformers")


@pytest.mark.parametrize("prompt", [["a"], [1, 2], [[1], [2]]])
def test_lists_are_for_vllm(prompt: Any):
    assert ask({"prompt": prompt})["prompt"] == prompt
    with pytest.raises(Refused, match="one text at a time"):
        ask({"prompt": prompt}, "transformers")


@pytest.mark.parametrize("prompt", ["a b c", ["a", "a b c"], [5, 6, 7, 8], [[5], [5, 6, 7, 8]]])
def test_prompt_and_answer_fit_into_the_positions(prompt: Any):
    assert ask({"prompt": prompt, "max_tokens": 60})["max_tokens"] == 60
    with pytest.raises(Refused, match=r"max_tokens: 61 is too many: the prompt has 4 tokens .* at most 60 fit"):
        ask({"prompt": prompt, "max_tokens": 61})


def test_a_prompt_that_leaves_no_room_is_named_itself():
    with pytest.raises(Refused, match=r"^prompt: "):
        ask({"prompt": "a " * 64, "max_tokens": 1})


def test_without_echo_at_least_one_token_is_asked_for():
    assert ask({"prompt": "a", "max_tokens": 0, "echo": True})["max_tokens"] == 0
    with pytest.raises(Refused, match=r"^max_tokens: must be at least 1"):
        ask({"prompt": "a", "max_tokens": 0, "echo": False})


def test_token_ids_are_in_the_vocabulary():
    with pytest.raises(Refused, match="token ids are below 100"):
        ask({"prompt": [99, 100]})


def test_a_request_has_not_more_answers_than_an_engine_gives_in_time():
    assert ask({"prompt": ["a"] * 8, "n": 128})["n"] == 128
    for body, key in (({"prompt": ["a"] * 9, "n": 128}, "n"), ({"prompt": [[5]] * 1025}, "prompt")):
        with pytest.raises(Refused, match=f"^{key}: .* at most 1,024"):
            ask(body)


def test_another_model_is_not_found():
    assert ask({"prompt": "a", "model": MODEL.name})["model"] == MODEL.name
    with pytest.raises(Refused) as refused:
        ask({"prompt": "a", "model": "12.01/60000"})
    assert refused.value.status == 404


def test_what_is_left_out_has_the_usual_value():
    assert ask({"prompt": "a"}) == {
        "model": MODEL.name,
        "prompt": "a",
        "max_tokens": 16,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    with pytest.raises(Refused, match=r"^prompt: "):
        ask({})


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":-Infinity}', b"\xff{}", b"[" * 100_000]
)
def test_a_body_that_is_no_object_is_refused(body: bytes):
    with pytest.raises(Refused):
        decoded(body)


def streamed(stop: Any, *texts: str) -> tuple[str, str]:
    """The text and the end that a client sees."""
    chunks = Chunks({"model": MODEL.name, "stop": stop}, "transformers")
    lines = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    lines.append({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    said = [json.loads(data) for line in lines for data in chunks.of(b"data: " + json.dumps(line).encode() + b"\n")]
    choices = [choice for each in said for choice in each["choices"]]
    assert all(each["model"] == MODEL.name for each in said)
    assert all(choice["text"] or choice.get("finish_reason") for choice in choices)
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize(
    ("stop", "texts", "seen"),
    [
        ("END", ["a", " E", "N", "D", " b"], ("a ", "stop")),
        ("END", ["a EN", "C"], ("a ENC", "length")),
        (["x", "ND"], ["aEN", "Dx"], ("aE", "stop")),
        ("END", ["END"], ("", "stop")),
        ([], ["a", "b"], ("ab", "length")),
    ],
)
def test_a_stream_ends_before_the_stop_text_however_it_is_cut(stop: Any, texts: list[str], seen: tuple[str, str]):
    assert streamed(stop, *texts) == seen
    whole = {"choices": [{"index": 0, "text": "".join(texts), "finish_reason": "length"}]}
    _, answer = completion(200, whole, {"model": MODEL.name, "stop": stop}, "transformers")
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == seen


def test_vllm_cuts_by_itself():
    """An echoed prompt may have the stop text, and a token without text has a log-probability."""
    said = {"choices": [{"index": 0, "text": "a END b", "finish_reason": "length"}]}
    request = {"model": MODEL.name, "stop": "END"}
    assert completion(200, said, request, "vllm")[1]["choices"][0]["text"] == "a END b"
    chunks, without = Chunks(request, "vllm"), {"index": 0, "text": "", "logprobs": {"tokens": ["\ufffd"]}}
    for choice in (without, {"index": 0, "text": "E"}):
        (data,) = chunks.of(f"data: {json.dumps({'choices': [choice]})}".encode())
        assert json.loads(data)["choices"] == [choice], "nothing is held back"


def test_errors_of_an_engine_have_one_form():
    request = {"model": MODEL.name}
    assert completion(422, {"detail": "no"}, request, "vllm") == (
        400,
        {"error": {"message": "the engine refuses this: no", "param": None}},
    )
    assert completion(404, {"error": {"message": "no", "code": 404}}, request, "vllm")[1]["error"]["message"].endswith(
        ": no"
    )
    assert completion(500, "Internal Server Error", request, "vllm")[0] == 502
