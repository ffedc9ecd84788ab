"""Events to and from plain JSON values. Additive changes only: unknown fields are ignored, missing take defaults."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from opt_ops.core.events import KINDS, Event, kind_of


class DecodeError(ValueError):
    """A journal line that is well formed but is not an event we know."""


def encode(event: Event) -> dict[str, Any]:
    """The event's kind and fields as JSON values."""
    return {"kind": kind_of(event), **_plain(event)}


def decode(fields: Mapping[str, Any]) -> Event:
    """The event that `encode` wrote.

    Raises:
        DecodeError: an unknown kind, a missing field or one of the wrong type; says which.
    """
    kind = fields.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DecodeError(f"unknown event kind {kind!r}: was this journal written by a newer version?")
    cls = KINDS[kind]
    try:
        return cast("Event", _build(cls, fields))
    except (TypeError, ValueError, KeyError) as error:
        raise DecodeError(f"event {kind}: {error}") from error


_AS_THEY_ARE = frozenset({str, int, float, bool, type(None)})


def _plain(value: Any) -> Any:
    cls = value.__class__
    if cls in _AS_THEY_ARE:
        return value
    if names := _names(cls):
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


@cache
def _names(cls: type) -> tuple[str, ...]:
    """A dataclass's fields; nothing of anything else."""
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _build(cls: type, fields: Mapping[str, Any]) -> Any:
    hints = _hints(cls)
    known = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields}
    return cls(**{name: _as(hints[name], value, name) for name, value in known.items()})


def _as(hint: Any, value: Any, name: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _as(hint, value, name)
    if hint is Any or origin is Mapping:
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{name} is not a list")
        return tuple(_as(args[0], item, name) for item in cast("list[Any]", value))
    if dataclasses.is_dataclass(hint):
        return _build(cast("type", hint), value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if issubclass(hint, StrEnum):
        return hint(value)
    if not isinstance(value, hint):
        raise TypeError(f"{name} is {value!r}, not {hint.__name__}")
    return value
