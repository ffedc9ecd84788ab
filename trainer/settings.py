"""The settings of nested frozen dataclasses by dotted keys: list them, and change one by ``key=value``."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from trainer.errors import UserError

_Config = TypeVar("_Config")


def settings_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings as (dotted key, value), in the order of their definition."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def changed(config: _Config, setting: str) -> _Config:
    """``config`` with one ``key=value`` applied. The value is parsed by the type of the setting.

    Raises:
        UserError: there is no such setting, or the value is not of its type.
    """
    key, separator, text = setting.partition("=")
    if not separator:
        raise UserError(f"--set {setting}: expected key=value, for example --set optim.peak_lr=3e-4.")
    known = [name for name, _ in settings_of(config)]
    if key not in known:
        raise UserError(
            f"--set {setting}: no setting is called {key!r}.{did_you_mean(key, known)} --list-recipes prints them all."
        )
    return _with(config, key.split("."), text, setting)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the known names that are similar to ``word``. Empty if there are none."""
    known = list(known)
    near = difflib.get_close_matches(word, known)
    near += [name for name in known if name.rpartition(".")[2] == word and name not in near]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _with(config: Any, path: Sequence[str], text: str, setting: str) -> Any:
    name, *rest = path
    if rest:
        return replace(config, **{name: _with(getattr(config, name), rest, text, setting)})
    kind = get_type_hints(type(config))[name]
    try:
        return replace(config, **{name: _parse(kind, text)})
    except (ValueError, KeyError):
        raise UserError(f"--set {setting}: {text!r} is not {_describe(kind)}.") from None


def _parse(kind: Any, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if get_origin(kind) is tuple:
        parts = text.split(",")
        return tuple(element(part) for element, part in zip(get_args(kind), parts, strict=True))
    return kind(text)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers separated by a comma"
    return {int: "a whole number", float: "a number", bool: "true or false"}[kind]
