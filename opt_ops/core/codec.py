"""Events to and from plain JSON values. Additive changes only: unknown fields are ignored, missing take defaults."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import StrEnum
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from opt_ops.core.events import KINDS, Event
from opt_ops.core.versions import VersionedSet

DEEPEST = 32
"""Levels of lists and objects in a free value such as `evidence`. Ours have three; JSON readers take hundreds."""
LARGEST_INTEGER = 2**64 - 1
"""JSON sets no limit, but readers of other languages have no larger integers."""


class DecodeError(ValueError):
    """A journal line that is well formed but is not an event we know."""


class UnknownKind(DecodeError):
    """An event of a kind that this version does not know: a newer one wrote it."""


class Vocabulary:
    """The kinds of events that a journal holds, to and from JSON values."""

    def __init__(self, kinds: Mapping[str, type[Any]]) -> None:
        self._kinds = kinds
        self._names = {cls: name for name, cls in kinds.items()}

    def kind_of(self, event: Any) -> str:
        """The event's name in the journal."""
        return self._names[type(event)]

    def encode(self, event: Any) -> dict[str, Any]:
        """The event's kind and fields as JSON values."""
        return {"kind": self.kind_of(event), **plain(event)}

    def decode(self, fields: Mapping[str, Any]) -> Any:
        """The event that `encode` wrote.

        Raises:
            UnknownKind: the kind is not known.
            DecodeError: a missing field or one of the wrong type; says which.
        """
        kind = fields.get("kind")
        if not isinstance(kind, str) or kind not in self._kinds:
            raise UnknownKind(f"unknown event kind {kind!r}: was this journal written by a newer version?")
        try:
            return reader_of(self._kinds[kind])(fields, kind)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise DecodeError(f"event {kind}: {error}") from error


LINEAGE = Vocabulary(KINDS)
"""Of the journals of lineages."""


def encode(event: Event) -> dict[str, Any]:
    """The kind and the fields of a lineage's event as JSON values."""
    return LINEAGE.encode(event)


def decode(fields: Mapping[str, Any]) -> Event:
    """The lineage's event that `encode` wrote.

    Raises:
        UnknownKind: the kind is not known.
        DecodeError: a missing field or one of the wrong type; says which.
    """
    return cast("Event", LINEAGE.decode(fields))


def check_limits(value: Any, depth: int = 0) -> None:
    """Check that every JSON reader can take a value.

    Raises:
        ValueError: an integer is too large, or lists and objects are nested too deeply.
    """
    if depth > DEEPEST + 8:  # a free value stands a few levels inside its event
        raise ValueError(f"lists and objects are nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        for item in cast("dict[str, Any]", value).values():
            check_limits(item, depth + 1)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            check_limits(item, depth + 1)
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError("an integer has more than 64 bits")


_AS_THEY_ARE = frozenset({str, int, float, bool, type(None)})


def plain(value: Any) -> Any:
    """A value of events or states as JSON values: dataclasses are objects, enumerations are their words."""
    cls = value.__class__
    if cls in _AS_THEY_ARE:
        return value
    if names := _names(cls):
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple, AbstractSet)):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value


@cache
def _names(cls: type) -> tuple[str, ...]:
    """A dataclass's fields; nothing of anything else."""
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


_Reader = Callable[[Any, str], Any]
"""Takes a JSON value and the name of its field; returns the value of the field's type, or raises."""


@cache
def reader_of(hint: Any) -> _Reader:
    """The function that checks a JSON value against a type and builds the value of that type.

    It raises TypeError, ValueError or OverflowError, with the name of the field, if the value is of another type.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        (some,) = (arg for arg in args if arg is not type(None))
        return _optional(reader_of(some))
    if hint is Any:
        return _free
    if origin is Mapping:
        return _mapping(reader_of(args[1]) if dataclasses.is_dataclass(args[1]) else _free)
    if origin is AbstractSet:
        return _set
    if origin is tuple:
        return _tuple(reader_of(args[0]))
    if dataclasses.is_dataclass(hint):
        return _dataclass(cast("type", hint))
    if issubclass(hint, StrEnum):
        return lambda value, _: hint(value)
    return {float: _float, int: _int, str: _str, bool: _bool}[hint]


def _dataclass(cls: type) -> _Reader:
    hints = get_type_hints(cls)
    readers = [(field.name, reader_of(hints[field.name])) for field in dataclasses.fields(cls)]

    def read(value: Any, name: str) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} is {_shown(value)}, not an object")
        fields = cast("Mapping[str, Any]", value)
        return cls(**{each: reader(fields[each], each) for each, reader in readers if each in fields})

    return read


def _optional(reader: _Reader) -> _Reader:
    return lambda value, name: None if value is None else reader(value, name)


def _mapping(reader: _Reader) -> _Reader:
    def read(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError(f"{name} is {_shown(value)}, not an object")
        return {key: reader(item, name) for key, item in cast("dict[str, Any]", value).items()}

    return read


def _tuple(reader: _Reader) -> _Reader:
    def read(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"{name} is not a list")
        return tuple([reader(item, name) for item in cast("list[Any]", value)])

    return read


def _set(value: Any, name: str) -> VersionedSet:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in cast("list[Any]", value)):
        raise TypeError(f"{name} is not a list of texts")
    return VersionedSet(cast("list[str]", value))


def _free(value: Any, name: str, depth: int = 0) -> Any:
    """A value of any JSON type: finite, and not nested too deeply."""
    if isinstance(value, float):
        return _float(value, name)
    if value is None or isinstance(value, (str, int)):
        return value
    if depth >= DEEPEST:
        raise ValueError(f"{name} is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        return {key: _free(item, name, depth + 1) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_free(item, name, depth + 1) for item in cast("list[Any]", value)]
    raise TypeError(f"{name} is {_shown(value)}, which is no JSON value")


def _float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {_shown(value)}, not float")
    if not math.isfinite(value):
        raise ValueError(f"{name} is not finite")
    return float(value)


def _int(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer():  # libraries for data frames write whole numbers so
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {_shown(value)}, not int")
    return value


def _str(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}, not str")
    return value


def _bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {_shown(value)}, not bool")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:80]
