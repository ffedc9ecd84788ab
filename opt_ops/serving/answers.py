"""What an engine answered, in one form for both: without the stop text, and with our name of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from opt_ops.core.text import clean

DONE = "[DONE]"
_LONGEST_ERROR = 500
_TELLING = ("text", "finish_reason", "logprobs")  # a token may be half a letter: it has no text


def error(message: str, param: str | None = None) -> dict[str, Any]:
    """The body of every answer that is no success."""
    return {"error": {"message": message, "param": param}}


def completion(status: int, said: Any, request: Mapping[str, Any], engine: str) -> tuple[int, dict[str, Any]]:
    """The status and the body for the client.

    Args:
        status: the engine's.
        said: its JSON, or text.
        request: as `keys.checked` returns it.
        engine: `vllm` or `transformers`, which leaves the `stop` in its answer.
    """
    if status != HTTPStatus.OK or not isinstance(said, dict):
        client = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
        why = f"the engine {'refuses this' if client else 'failed'}: {_why(said)}"
        return HTTPStatus.BAD_REQUEST if client else HTTPStatus.BAD_GATEWAY, error(why)
    for choice in said["choices"]:
        text, ended = _cut(choice["text"], _stops(request, engine))
        if ended:
            choice.update(text=text, finish_reason="stop")
    return HTTPStatus.OK, {**said, "model": request["model"]}


class Chunks:
    """The events of a streamed answer.

    Args:
        request: as `keys.checked` returns it.
        engine: `vllm` or `transformers`, of which what may be the beginning of the `stop` is held back.
    """

    def __init__(self, request: Mapping[str, Any], engine: str) -> None:
        self._name, self._stops = request["model"], _stops(request, engine)
        self._keep = max(map(len, self._stops), default=1) - 1
        self._held: dict[int, str] = {}
        self._ended: set[int] = set()

    def of(self, line: bytes) -> Iterator[str]:
        """What the client gets for a line of the engine: the data of none or one event."""
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.strip()
        if field != "data" or value == DONE:
            return
        said = json.loads(value)
        if "error" in said:
            yield json.dumps(error(f"the engine failed: {_why(said)}"))
            return
        for choice in said["choices"]:
            self._hold_back(choice)
        said["choices"] = [each for each in said["choices"] if any(map(each.get, _TELLING))]
        if said["choices"]:
            yield json.dumps({**said, "model": self._name})

    def _hold_back(self, choice: dict[str, Any]) -> None:
        at = choice["index"]
        text, ended = _cut(self._held.pop(at, "") + choice["text"], self._stops)
        if at in self._ended:
            text = ""
        if ended:
            self._ended.add(at)
        if choice.get("finish_reason"):
            choice["finish_reason"] = "stop" if at in self._ended else choice["finish_reason"]
        elif self._keep and not ended:
            text, self._held[at] = text[: -self._keep], text[-self._keep :]
        choice["text"] = text


def _stops(request: Mapping[str, Any], engine: str) -> Sequence[str]:
    stop = request.get("stop", []) if engine == "transformers" else []  # vLLM cuts by itself
    return [stop] if isinstance(stop, str) else stop


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop, and whether there is one."""
    found = min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
    return (text, False) if found < 0 else (text[:found], True)


def _why(said: Any) -> str:
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and key in said:
            return _why(said[key])
    return clean(said if isinstance(said, str) else json.dumps(said), _LONGEST_ERROR)
