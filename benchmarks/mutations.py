"""Makes hostile input of a good record: one field changed at any depth, broken bytes, huge lines, other kinds of file.

`wrong` gives a value that no reader may take for the one that was meant, so what it does to a run can be told: nothing.
`any_value` gives a value of any JSON type; some of them are plausible lies, which may make a supervisor act.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

Place = tuple[Any, Any]  # a container, and the key or index in it


class Raw:
    """JSON text that Python's encoder does not write: numbers beyond every type, deep nesting, lone surrogates."""

    def __init__(self, text: str) -> None:
        self.text = text


_TEXTS = ("", "x", "9", "nan", "a" * 100_000, "\x00\x1b[2J\u202e", Raw('"\\ud800"'))
_NOT_NUMBERS = (Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("1" + "0" * 400), Raw("1" * 5000))
_NUMBERS = (0, -1, 1.0, 2.5, -0.0, 1e308, 2**31, 2**63, 2**64, 10**18)
_CONTAINERS = ([], {}, [[]], [1, 2, 3], {"a": {"b": 1}}, list(range(5000)), Raw("[" * 3000 + "]" * 3000))
_EVERYTHING = (None, True, False, *_TEXTS, *_NOT_NUMBERS, *_NUMBERS, *_CONTAINERS)


def wrong(old: Any, random: Random) -> Any:
    """A value of another JSON type than `old`, or none that a number may have."""
    pools: list[tuple[Any, ...]] = [_CONTAINERS] if not isinstance(old, (list, dict)) else [_TEXTS, _NUMBERS]
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        pools += [_NOT_NUMBERS, ("", "x", "nan"), (Raw('"\\ud800"'),)]
    return random.choice(random.choice(pools))


def any_value(old: Any, random: Random) -> Any:
    """Any JSON value or edge value."""
    return random.choice(_EVERYTHING)


def places(value: Any) -> Iterator[Place]:
    """Every place of a record, at any depth."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate(record: Any, random: Random, lies: bool, keep: frozenset[str] = frozenset()) -> str:
    """The JSON text of a record with one change. Without `lies`, fields named in `keep` stay as they are."""
    changed = deepcopy(record)
    found = [place for place in places(changed) if lies or place[1] not in keep]
    container, key = random.choice(found)
    kind = random.random()
    if kind < 0.15 and isinstance(container, dict):
        container[f"unknown_{random.randrange(9)}"] = random.choice(_EVERYTHING)
    elif kind < 0.25 and lies:
        del container[key]
    else:
        container[key] = (any_value if lies else wrong)(container[key], random)
    return to_json(changed)


def to_json(value: Any) -> str:
    """JSON text, with the text of each `Raw` as it is."""
    raw: list[str] = []

    def encode(each: Any) -> Any:
        if isinstance(each, Raw):
            raw.append(each.text)
            return f"@raw{len(raw) - 1}@"
        if isinstance(each, dict):
            return {name: encode(inner) for name, inner in each.items()}
        return [encode(inner) for inner in each] if isinstance(each, list) else each

    text = json.dumps(encode(value))
    for number, replacement in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', replacement)
    return text


def break_bytes(good: bytes, random: Random) -> bytes:
    """A line that is no record any more."""
    cut = random.randrange(len(good))
    return random.choice(
        (
            good[:cut],
            good[:cut] + b"\xff\xfe\xed\xa0\x80" + good[cut:],
            good[:cut] + b"\x00" * 64 + good[cut + 64 :],
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"17",
            b"{" * 4000,
            b"\xef\xbb\xbf\xef\xbb\xbf{}",
            b'{"x": "' + b"y" * 3_000_000,
            random.randbytes(200).replace(b"\n", b" "),
        )
    )


def other_kind(path: Path, random: Random) -> None:
    """Put something that is no regular file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    makers: tuple[Callable[[], None], ...] = (
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: _bind(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/full"),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to(path.with_name("nowhere")),
    )
    random.choice(makers)()


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
