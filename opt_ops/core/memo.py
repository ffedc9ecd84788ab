"""Results that are kept until an argument is another object: for what a tick asks many times of an unchanged state."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def memoize_last(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Remember the newest result of a pure function of immutable arguments, which are distinguished by identity."""
    kept: list[tuple[tuple[object, ...], _T]] = []  # holds its arguments, so that no other object gets their identity

    @wraps(function)
    def remembering(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if kwargs or not kept or any(a is not b for a, b in zip(kept[0][0], args, strict=True)):
            kept[:] = [(args, function(*args, **kwargs))]
        return kept[0][1]

    return remembering
