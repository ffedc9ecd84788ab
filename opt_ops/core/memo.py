"""Results that are kept until an argument is another object: for what a tick asks many times of an unchanged state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

KEPT = 64
"""Results of a function: a daemon asks for each of its lineages in turn."""


def memoize_recent(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Remember the last results of a pure function of immutable arguments, which are distinguished by identity."""
    kept: OrderedDict[tuple[int, ...], tuple[object, _T]] = OrderedDict()

    @wraps(function)
    def remembering(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        assert not kwargs, "arguments of what is remembered have places, and no names"
        key = tuple(map(id, args))
        if key in kept:
            kept.move_to_end(key)
        else:
            kept[key] = args, function(*args, **kwargs)  # holds its arguments, so that no other object gets their id
            if len(kept) > KEPT:
                kept.popitem(last=False)
        return kept[key][1]

    return remembering
