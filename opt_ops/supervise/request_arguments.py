"""The arguments of a request as typed values in bounds. What is beyond them is refused, never cut or guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

LONGEST_NAME = 255
LONGEST_REASON = 4096
LONGEST_TEXT = 65_536  # of a note
MOST_NODES = 100_000
MOST_RANKS = 1024  # on a node
MOST_RANKS_IN_ALL = 1_000_000
MOST_STEPS = 10**9
MOST_VALUES = 10_000  # of a list
MOST_AT_ONCE = 100  # requests of one inbox in one tick: each is synced to the disk, and all else waits

_LINEAGE = re.compile(r"[0-9]{1,9}")
_MISSING = object()


class InvalidRequest(ValueError):
    """A request that cannot be carried out. The message is the reason."""


class Arguments:
    """The arguments of one request. Every method raises `InvalidRequest` for a value that is not of its type.

    An argument that is missing and has no default raises KeyError with its name.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def _value(self, name: str, default: Any) -> Any:
        if default is _MISSING:
            return self._given[name]
        value = self._given.get(name)
        return default if value is None else value

    def text(self, name: str, longest: int = LONGEST_NAME, default: Any = _MISSING) -> str:
        """Return text of at most `longest` characters."""
        return _text(self._value(name, default), name, longest)

    def optional_text(self, name: str, longest: int = LONGEST_REASON) -> str | None:
        """Return text; None if the argument is null. It must not be missing."""
        return None if self._given[name] is None else self.text(name, longest)

    def texts(self, name: str, default: Any = _MISSING) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self._value(name, default)
        if not isinstance(value, list | tuple):
            raise InvalidRequest(f"{name} is not a list")
        found = cast("Sequence[Any]", value)
        if len(found) > MOST_VALUES:
            raise InvalidRequest(f"{name} has {len(found)} values; at most {MOST_VALUES} are taken")
        return tuple(_text(each, name, LONGEST_REASON) for each in found)

    def lineage(self, name: str) -> str:
        """Return the number of a lineage."""
        found = self.text(name)
        if not _LINEAGE.fullmatch(found):
            raise InvalidRequest(f"{name} is {found!r}, not the number of a lineage")
        return found

    def flag(self, name: str) -> bool:
        """Return true or false; false if the argument is missing."""
        value = self._value(name, False)
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is not true or false")
        return value

    def whole(self, name: str, low: int, high: int, default: Any = _MISSING) -> int:
        """Return a whole number. It may be written as a float."""
        value = self._value(name, default)
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not math.isfinite(value) or value != int(value):
            raise InvalidRequest(f"{name} is not a whole number")
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {int(value)}; it must be from {low} to {high}")
        return int(value)

    def optional_whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number; None if the argument is missing or null."""
        return None if self._given.get(name) is None else self.whole(name, low, high)

    def positive(self, name: str) -> float:
        """Return a number above 0."""
        value = self._given[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(f"{name} is not a number")
        if not 0 < value <= 1e12:
            raise InvalidRequest(f"{name} is {value}; it must be above 0, and at most 1e12")
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        """Return a number above 0; None if the argument is missing or null."""
        return None if self._given.get(name) is None else self.positive(name)

    def has(self, name: str) -> bool:
        """Whether the argument is there, and is not null."""
        return self._given.get(name) is not None

    def parts(self, name: str) -> tuple[Arguments, ...]:
        """Return the arguments within each object of a list; none if the argument is missing."""
        value = self._value(name, ())
        if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) > MOST_VALUES:
            raise InvalidRequest(f"{name} is not a list of at most {MOST_VALUES} objects")
        return tuple(Arguments({name: each}).part(name) for each in cast("Sequence[Any]", value))

    def part(self, name: str) -> Arguments:
        """Return the arguments within an argument."""
        value = self._given[name]
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{name} is not an object")
        return Arguments(cast("Mapping[str, Any]", value))


def _text(value: Any, name: str, longest: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is not text")
    if len(value) > longest:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {longest} are taken")
    if "\0" in value:
        raise InvalidRequest(f"{name} holds a null character")
    return value
