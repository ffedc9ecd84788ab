"""The keys of a completion request: what each value must be, and which engine honours it.

An engine that ignores a key would answer another question than the one that was asked. So what stands in no table is
refused with the key's name. The tables are of transformers 5.23 (`cli/serving/completion.py`) and vLLM 0.32
(`entrypoints/openai/completion/protocol.py`, `sampling_params.py`). Each key was tried with both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SEEDS = range(2**63)  # what torch and vLLM take; to vLLM, -1 is none
_COLDEST = 0.01  # vLLM makes that of what is less; transformers divides by it, and fails
_MOST_STOPS, _LONGEST_STOP = 4, 64  # OpenAI's number; transformers builds tables as large as the vocabulary for each
_MOST_ANSWERS = 1024  # to a request; as many prompts vLLM takes. More would keep it busy for minutes
DEFAULTS = {"max_tokens": 16, "temperature": 1.0, "top_p": 1.0}  # OpenAI's and vLLM's


class Refused(Exception):
    """A request that is not answered. `param` is the key that is wrong; `status` the HTTP status."""

    def __init__(self, why: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(f"{param}: {why}" if param else why)
        self.param, self.status = param, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served.

    Attributes:
        name: by which requests may call it: run and step, such as `12.01/61000`.
        positions: tokens of prompt and answer together.
        vocabulary: size; token ids are below it.
    """

    name: str
    positions: int
    vocabulary: int


def _whole(least: int, most: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def _is_text(value: Any) -> bool:
    """Whether it can be written as UTF-8: JSON may hold half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _is_prompt(value: Any) -> bool:
    if _is_text(value) or _is_ids(value):
        return True
    return isinstance(value, list) and bool(value) and (all(map(_is_text, value)) or all(map(_is_ids, value)))


def _is_stop(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return 0 < len(several) <= _MOST_STOPS and all(
        _is_text(each) and 0 < len(each) <= _LONGEST_STOP for each in several
    )


_FLAG = ("true or false", lambda value: isinstance(value, bool))
KEYS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a text", _is_text),
    "prompt": ("a text, a list of texts, a list of token ids or a list of such lists", _is_prompt),
    "max_tokens": ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
    "temperature": (
        f"0, or a number from {_COLDEST} to 2",
        lambda value: type(value) in (int, float) and (value == 0 or _COLDEST <= value <= 2),
    ),
    "top_p": ("a number above 0, to 1", lambda value: type(value) in (int, float) and 0 < value <= 1),
    "n": _whole(1, 128),
    "stop": (f"a text or a list of 1 to {_MOST_STOPS} texts, each of 1 to {_LONGEST_STOP} characters", _is_stop),
    "seed": ("a whole number, 0 or more and below 2^63", lambda value: type(value) is int and value in _SEEDS),
    "stream": _FLAG,
    "echo": _FLAG,
    "logprobs": _whole(0, 20),
}
ENGINES: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(KEYS),
    "transformers": frozenset(KEYS) - {"n", "echo", "logprobs"},
}


def decoded(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. A key that stands there twice, NaN and infinity are refused.

    Raises:
        Refused: it is none.
    """
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON object in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise Refused("the body is JSON, but no object")
    return found


def checked(
    body: Mapping[str, Any], engine: str, model: Model, count: Callable[[Sequence[str]], Sequence[int]]
) -> dict[str, Any]:
    """The request with its defaults.

    Args:
        body: the JSON object.
        engine: a key of `ENGINES`.
        model: what is served.
        count: tokens of each of some texts, with `</s>` in front.

    Raises:
        Refused: 400, or 404 for another model.
    """
    for key, value in body.items():
        if key not in KEYS:
            raise Refused(f"this key is not served; those that are: {', '.join(sorted(ENGINES[engine]))}", key[:80])
        if key not in ENGINES[engine]:
            raise Refused(f"engine {engine} ignores it; use --engine vllm", key)
        wanted, fits = KEYS[key]
        if not fits(value):
            raise Refused(f"must be {wanted}", key)
    if body.get("model", model.name) != model.name:
        raise Refused(f"only {model.name} is served here", "model", 404)
    if "prompt" not in body:
        raise Refused("it is missing", "prompt")
    request = {**DEFAULTS, **body, "model": model.name}
    if engine == "transformers" and not isinstance(request["prompt"], str):
        raise Refused(
            "engine transformers takes one text at a time; send several requests, or use --engine vllm", "prompt"
        )
    _require_room(request, model, count)
    return request


def _require_room(request: Mapping[str, Any], model: Model, count: Callable[[Sequence[str]], Sequence[int]]) -> None:
    prompt, wanted = request["prompt"], request["max_tokens"]
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    texts = [each for each in several if isinstance(each, str)]
    if any(token >= model.vocabulary for ids in several if isinstance(ids, list) for token in ids):
        raise Refused(f"token ids are below {model.vocabulary}", "prompt")
    if len(several) * request.get("n", 1) > _MOST_ANSWERS:
        why = f"{len(several):,} prompts, {request.get('n', 1)} answers each: at most {_MOST_ANSWERS:,} are given"
        raise Refused(why, "n" if "n" in request else "prompt")
    longest = max(count(texts) if texts else map(len, several))
    if wanted < 1 and not request.get("echo"):
        raise Refused("must be at least 1", "max_tokens")
    if longest + wanted > model.positions:
        room = max(0, model.positions - longest)
        raise Refused(
            f"{wanted} is too many: the prompt has {longest} tokens and the model {model.positions} positions, so at "
            f"most {room} fit",
            "max_tokens" if room else "prompt",
        )


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
