"""The settings of nested frozen dataclasses by dotted keys: list them, and change one by ``key=value``."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from trainer.errors import UserError

_MOST_SUGGESTIONS = 4

# Names that other trainers have for a setting, by the part that finds ours.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "batch_size": "batch",
    "sequence_length": "seq_len",
    "context_length": "seq_len",
    "max_steps": "steps",
    "grad_clip": "clip_norm",
    "gradient_clipping": "clip_norm",
    "fp16": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "gradient_checkpointing": "checkpoint_activations",
    "width": "hidden_size",
    "depth": "num_layers",
}

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
        near = dict.fromkeys([*_sharing_parts(key, known), *difflib.get_close_matches(key, known)])
        raise UserError(
            f"--set {setting}: no setting is called {key!r}.{_suggestion([*near])} --list-recipes prints them all."
        )
    return _with(config, key.split("."), text, setting)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the known names that are similar to ``word``. Empty if there are none."""
    return _suggestion(difflib.get_close_matches(word, list(known), cutoff=0.7))  # names of one family are alike anyway


def _suggestion(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(names[:_MOST_SUGGESTIONS])}?" if names else ""


def _sharing_parts(key: str, known: Sequence[str]) -> list[str]:
    """The settings that share most with ``key``: parts between ``.`` and ``_``, their beginnings, or the initials.

    The group before the last dot only decides between settings that share the same: ``optim.lr`` is ``optim.peak_lr``.
    """
    group, _, last = key.lower().replace("-", "_").rpartition(".")
    words = _OTHER_NAMES.get(last, last).split("_")
    counts = {name: 2 * _shared(words, name.rpartition(".")[2]) for name in known}
    counts = {name: count + (name.rpartition(".")[0] == group) for name, count in counts.items() if count}
    return [name for name, count in counts.items() if count == max(counts.values())]


def _shared(words: Sequence[str], name: str) -> int:
    parts, squeezed = name.split("_"), "".join(words)
    if squeezed == "".join(part[0] for part in parts):
        return 2
    by_words = sum(2 if word in parts else any(_begins(word, part) for part in parts) for word in words)
    return by_words or (len(squeezed) > 2 and squeezed in name.replace("_", ""))


def _begins(word: str, part: str) -> bool:
    return len(word) > 2 and part.startswith(word)


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
