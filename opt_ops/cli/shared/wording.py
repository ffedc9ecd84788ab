"""Values of the journal in words: what people read holds no spelling of Python's, and counts rungs from 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from opt_ops.core.text import clock

_SHOWN = 3  # of a list of records: the rest is counted; `-o json` has all of them


def values(fields: Mapping[str, Any]) -> str:
    """Names and values with commas between; `-` for none."""
    return ", ".join(f"{name} {value(name, given)}" for name, given in fields.items()) or "-"


def pairs(fields: Mapping[str, Any]) -> str:
    """`key=value` with blanks between; a value with blanks in it stands in quotation marks. `-` for none."""
    shown = ((name, value(name, given)) for name, given in fields.items())
    return " ".join(f"{name}=“{text}”" if " " in text else f"{name}={text}" for name, text in shown) or "-"


def value(name: str, given: Any) -> str:
    """A value for people: a time as a time, a list without brackets, a record as its own names and values."""
    if given is None or given == "":
        return "-"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        return clock(given) if name == "at" or name.endswith("_at") else f"{given:.4g}"
    if isinstance(given, Mapping):
        return _record(cast("Mapping[str, Any]", given))
    if isinstance(given, list | tuple):
        return _list(name, cast("list[Any]", list(given)))
    return str(given + 1) if name == "rung" and isinstance(given, int) else str(given)


def _record(given: Mapping[str, Any]) -> str:
    if {"run", "step", "path"} <= given.keys():  # a checkpoint
        return f"step {given['step']} of run {given['run']}"
    known = {name: each for name, each in given.items() if each not in (None, "", [], {})}
    return f"({values(known)})" if known else "-"


def _list(name: str, given: list[Any]) -> str:
    if not given:
        return "-"
    if not any(isinstance(each, Mapping) for each in given):
        return ",".join(value(name, each) for each in given)
    shown = [value(name, each) for each in given[:_SHOWN]]
    return " ".join([*shown, *([f"and {len(given) - _SHOWN} more"] if len(given) > _SHOWN else [])])
