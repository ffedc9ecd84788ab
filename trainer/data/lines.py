"""One line of JSON as a text, or the reason why it is none."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.content import conversion_of, encoding_of

_NEEDED = 'not a JSON object with a string "text" in UTF-8'

_KEYS_SHOWN = 8
_KEY_LENGTH = 40
LINES_SHOWN = 10  # corrupt lines that a message names; of others it says the number


@dataclass(frozen=True, slots=True)
class CorruptLine:
    """A line that is not a document, and why."""

    path: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {_NEEDED} ({self.why})"

    @property
    def cause(self) -> str:
        """The reason without what differs from line to line."""
        return self.why.partition(";")[0].partition(" at character ")[0]


def text_of(line: bytes) -> tuple[str | None, str]:
    """The text of a line, or None and the reason in words."""
    line = line.rstrip()
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        why = f"not UTF-8, probably {encoding_of(line)}; the first such byte is 0x{line[error.start]:02X}"
        command = conversion_of(line)
        return None, f"{why}; if all lines are so: {command}" if command else why
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except ValueError as error:
        return None, _not_json(line, error)
    if not isinstance(value, dict):
        return None, f"{_kind(value)}, and not a JSON object"
    if "text" not in value:
        return None, _no_text(value)
    text = value["text"]
    if not isinstance(text, str):
        return None, f'"text" is {_kind(text)}, and not a string'
    try:
        text.encode()
    except UnicodeEncodeError:
        return None, '"text" has half of a surrogate pair'
    return text, ""


def named(corrupt: Sequence[CorruptLine]) -> Iterator[str]:
    """The first lines, each cause once, and the number of the other lines."""
    ordered = sorted(corrupt, key=lambda line: (line.path, line.line))
    told: set[str] = set()
    for line in ordered[:LINES_SHOWN]:
        yield f"{line.path}:{line.line}: the same" if line.cause in told else str(line)
        told.add(line.cause)
    if len(ordered) > LINES_SHOWN:
        yield f"and {len(ordered) - LINES_SHOWN:,} more"


def _not_json(line: bytes, error: ValueError) -> str:
    if line.endswith(b",") and text_of(line[:-1])[0] is not None:
        return "a comma after the JSON object"
    if not line.lstrip().removeprefix(b"\xef\xbb\xbf").startswith((b"{", b"[", b'"')):
        return "plain text, and not a JSON object; a file with one plain text needs the ending .txt"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return "not JSON"


def _no_text(value: dict[str, Any]) -> str:
    if not value:
        return 'no key "text"; the object is empty'
    inside = [key for key, inner in value.items() if _has_text(inner)]
    keys = [json.dumps(key[:_KEY_LENGTH], ensure_ascii=False) for key in value]
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    found = f'no key "text"; the keys are {", ".join(keys[:_KEYS_SHOWN])}{more}'
    name = json.dumps(inside[0][:_KEY_LENGTH], ensure_ascii=False) if inside else ""
    if inside:
        return f"{found}; inside of {name} there is one{_converted(f'{inside[0]}.text', value[inside[0]])}"
    texts = {key: each for key, each in value.items() if isinstance(each, str)}
    longest = max(texts, key=lambda key: len(texts[key]), default="")
    return found + _converted(longest, value)


def _converted(place: str, holder: Any) -> str:
    """The command that makes lines with a text of lines with the text at this place, if a shell takes it as it is."""
    if not isinstance(holder, dict) or not re.fullmatch(r"[A-Za-z_]\w*(\.text)?", place, re.ASCII):
        return ""
    return f"; if all lines are so: jq -c '{{text: .{place}}}'"


def _has_text(inner: Any) -> bool:
    first = inner[0] if isinstance(inner, list) and inner else inner
    return isinstance(first, dict) and "text" in first


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
