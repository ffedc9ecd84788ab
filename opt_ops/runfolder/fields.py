"""Reads typed, bounded and finite values from foreign JSON. Nothing behind a reader of this package sees raw values.

A converter takes any JSON value and returns a value of its type, or raises `BadField`. `Record` applies converters to
the fields of one JSON object and keeps the reason for each field that it leaves out. docs/formats.md has the bounds.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from opt_ops.core.text import clean

_T = TypeVar("_T")

LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 1e30
"""Larger numbers are taken as this: sums, squares and differences of accepted values stay finite."""
LAST_MOMENT = 7_258_118_400.0
"""The year 2200, in seconds since the epoch. Text forms of later times and sums with them may overflow."""
MOST_STEPS = 10**9
MOST_RANKS = 2**20
LONGEST_TEXT = 4096
LONGEST_NAME = 255
MOST_ITEMS = 65_536
MOST_DEPTH = 8
_NON_FINITE = frozenset({"nan", "inf", "infinity"})


class BadField(ValueError):
    """A value that is not what docs/formats.md says. The message says what it is: `is text`."""


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "text"
        case int() | float():
            return "a number"
        case Mapping():
            return "an object"
        case _:
            return "a list"


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadField(f"is {kind_of(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[Any], float]:
    """A finite number from `low` to `high`. Beyond ±`LARGEST_FLOAT` it is taken as that."""

    def convert(value: Any) -> float:
        found = _float(value)
        if not math.isfinite(found):
            raise BadField("is not a finite number")
        if not low <= found <= high:
            raise BadField(f"is {found:g}, not from {low:g} to {high:g}")
        return min(max(found, -LARGEST_FLOAT), LARGEST_FLOAT)

    return convert


def whole(low: int = -LARGEST_INT, high: int = LARGEST_INT) -> Callable[[Any], int]:
    """A whole number from `low` to `high`. `3.0` is one: libraries for data frames write them so."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadField(f"is {kind_of(value)}, not a whole number")
        if isinstance(value, float):
            if not value.is_integer():
                raise BadField(f"is {value:g}, not a whole number")
            value = int(value)
        if not low <= value <= high:
            raise BadField(f"is not from {low} to {high}")
        return value

    return convert


def text(longest: int = LONGEST_TEXT) -> Callable[[Any], str]:
    """Text. What is no Unicode (a lone surrogate) becomes `�`. Longer text is cut."""

    def convert(value: Any) -> str:
        if not isinstance(value, str):
            raise BadField(f"is {kind_of(value)}, not text")
        return clean(value, longest)

    return convert


def name(value: Any) -> str:
    """A name: text of 1 to 255 characters."""
    found = text(LONGEST_NAME + 1)(value)
    if not 0 < len(found) <= LONGEST_NAME:
        raise BadField(f"is text of {len(found)} characters, not of 1 to {LONGEST_NAME}")
    return found


def flag(value: Any) -> bool:
    """True or false. 1 and 0 are taken for them."""
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadField(f"is {kind_of(value)}, not true or false")


moment = number(0.0, LAST_MOMENT)
"""Seconds since the epoch, up to the year 2200."""
seconds = number(0.0, 1e9)
"""A duration."""
step = whole(0, MOST_STEPS)
"""A step of training."""
rank = whole(0, MOST_RANKS - 1)
"""A rank. Whether the attempt has it is not known here."""


def maybe_not_finite(value: Any) -> float | None:
    """A number; None if it is not finite, however that is spelled: `null`, `NaN`, `1e999`, or the text `"nan"`."""
    if value is None or (isinstance(value, str) and value.strip().lower().lstrip("+-") in _NON_FINITE):
        return None
    found = _float(value)
    return min(max(found, -LARGEST_FLOAT), LARGEST_FLOAT) if math.isfinite(found) else None


def items(convert: Callable[[Any], _T], most: int = MOST_ITEMS) -> Callable[[Any], tuple[_T, ...]]:
    """A list of at most `most` values of one type."""

    def converted(value: Any) -> tuple[_T, ...]:
        return tuple(convert(each) for each in values(value, most))

    return converted


def values(value: Any, most: int = MOST_ITEMS) -> Sequence[Any]:
    """A list of at most `most` values.

    Raises:
        BadField: it is no list, or longer.
    """
    if not isinstance(value, list):
        raise BadField(f"is {kind_of(value)}, not a list")
    found = cast("list[Any]", value)
    if len(found) > most:
        raise BadField(f"has {len(found)} values, more than {most}")
    return found


def members(value: Any, most: int = MOST_ITEMS) -> Mapping[str, Any]:
    """An object of at most `most` fields.

    Raises:
        BadField: it is no object, or larger.
    """
    if not isinstance(value, dict):
        raise BadField(f"is {kind_of(value)}, not an object")
    found = cast("dict[str, Any]", value)
    if len(found) > most:
        raise BadField(f"has {len(found)} fields, more than {most}")
    return found


def plain(value: Any, depth: int = MOST_DEPTH, most: int = 256) -> Any:
    """Any JSON value in bounds: text without surrogates, finite numbers (else null), `most` members at each level."""
    if isinstance(value, str):
        return clean(value, LONGEST_TEXT)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and abs(value) <= LARGEST_INT:
        return value
    if isinstance(value, int | float):
        return maybe_not_finite(value)
    if depth == 0:
        return "…"
    if isinstance(value, dict):
        known = list(cast("dict[Any, Any]", value).items())[:most]
        return {clean(str(key), LONGEST_NAME): plain(each, depth - 1, most) for key, each in known}
    return [plain(each, depth - 1, most) for each in list(value)[:most]]


def plain_object(value: Any) -> Mapping[str, Any]:
    """An object of any JSON values, in bounds. What is beyond them is cut."""
    return plain(dict(members(value)))


def why_not_plain(value: Any, depth: int = MOST_DEPTH) -> str:
    """Why a JSON value cannot be taken as it is: numbers, text or nesting beyond all bounds. Empty: it can."""
    if isinstance(value, str):
        return "" if clean(value, len(value)) == value else "holds text that is no Unicode"
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int | float):
        finite = abs(value) <= LARGEST_INT if isinstance(value, int) else math.isfinite(value)
        return "" if finite else "holds a number that is not finite, or too large"
    if depth == 0:
        return f"is nested more than {MOST_DEPTH} deep"
    if isinstance(value, dict):
        found = cast("dict[str, Any]", value)
        return next(filter(None, (why_not_plain(each, depth - 1) for pair in found.items() for each in pair)), "")
    return next(filter(None, (why_not_plain(each, depth - 1) for each in value)), "")


class Record:
    """The fields of one JSON object. Unknown fields are ignored.

    Attributes:
        left_out: the reason for each field that was left out: "`wps` is text, not a number".
    """

    def __init__(self, fields: Any, within: str = "", left_out: list[str] | None = None) -> None:
        """`within` is the name of the object in its record, with a dot; `left_out` is the list of that record.

        Raises:
            BadField: it is no object.
        """
        self._fields = members(fields)
        self._within = within
        self.left_out: list[str] = [] if left_out is None else left_out

    def required(self, name: str, convert: Callable[[Any], _T]) -> _T:
        """Return a field without which the record says nothing.

        Raises:
            BadField: it is missing or not of its type.
        """
        if name not in self._fields:
            raise BadField(f"`{self._within}{name}` is missing")
        try:
            return convert(self._fields[name])
        except BadField as error:
            raise self._named(name, error) from error

    def optional(self, name: str, convert: Callable[[Any], _T], default: _T) -> _T:
        """Return a field; `default` if it is missing, null, or not of its type. Only the last is noted."""
        value = self._fields.get(name)
        if value is None:
            return default
        try:
            return convert(value)
        except BadField as error:
            self.left_out.append(str(self._named(name, error)))
            return default

    def nullable(self, name: str, convert: Callable[[Any], _T], default: _T) -> _T:
        """Return a field; `default` if it is missing or null.

        Raises:
            BadField: it is not of its type.
        """
        return default if self._fields.get(name) is None else self.required(name, convert)

    def part(self, name: str) -> Record | None:
        """Return an object within the record; None if it is missing, null, or no object."""
        found = self.optional(name, members, None)
        return None if found is None else Record(found, f"{self._within}{name}.", self.left_out)

    def each(self, name: str, convert: Callable[[Record], _T], most: int = MOST_ITEMS) -> tuple[_T, ...]:
        """Return the objects of a list, without those that `convert` refuses. No list is an empty one."""
        found: list[_T] = []
        for number, value in enumerate(self.optional(name, lambda value: values(value, most), ())):
            within = f"{self._within}{name}[{number}]"
            try:
                found.append(convert(Record(value, f"{within}.", self.left_out)))
            except BadField as error:
                self.left_out.append(str(error) if str(error).startswith("`") else f"`{within}` {error}")
        return tuple(found)

    def all(self, convert: Callable[[Any], _T], most: int = MOST_ITEMS) -> Iterator[tuple[str, _T]]:
        """Yield the names and values of an object whose names are not known, at most `most`."""
        for name, value in list(self._fields.items())[:most]:
            try:
                yield clean(name, LONGEST_NAME), convert(value)
            except BadField as error:
                self.left_out.append(str(self._named(name, error)))

    def build(self, cls: type[_T], **given: Any) -> _T:
        """Return a dataclass of plain fields. A field without a default is required, any other is optional.

        Raises:
            BadField: a required field is missing or not of its type.
        """
        known = {
            name: self.required(name, convert) if needed else self.optional(name, convert, default)
            for name, convert, needed, default in _plan(cls)
            if name not in given
        }
        return cls(**known, **given)

    def _named(self, name: str, error: BadField) -> BadField:
        words = str(error)
        return error if words.startswith("`") else BadField(f"`{self._within}{name}` {words}")


@cache
def _plan(cls: type) -> tuple[tuple[str, Callable[[Any], Any], bool, Any], ...]:
    """How each field of a dataclass is read: name, converter, whether it is required, default."""
    hints = get_type_hints(cls)
    found: list[tuple[str, Callable[[Any], Any], bool, Any]] = []
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if (convert := _converter(hints[field.name])) is not None:
            found.append((field.name, convert, needed, None if needed else field.default))
    return tuple(found)


_CONVERTERS: Mapping[Any, Callable[[Any], Any]] = {int: whole(), float: number(), str: text(), bool: flag}


def _converter(hint: Any) -> Callable[[Any], Any] | None:
    """The converter of a plain type, or of one that may be null; None for any other type."""
    if get_origin(hint) in (types.UnionType, Union):
        wanted = [each for each in get_args(hint) if each is not type(None)]
        convert = _CONVERTERS.get(wanted[0]) if len(wanted) == 1 else None
        return None if convert is None else lambda value: None if value is None else convert(value)
    return _CONVERTERS.get(hint)
