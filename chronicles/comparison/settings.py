"""The settings in which two lineages differ, by their trainers' own words: config.json of the newest attempts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chronicles.comparison.family import Family
from chronicles.record import newest_config
from opt_ops.core.state.data import in_words

_OF_AN_ATTEMPT = frozenset({"v", "attempt", "host", "ts", "resume", "node", "pid"})
"""What differs between any two attempts of one lineage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting that differs, with its value in each lineage; None: it has none there."""

    key: str
    values: tuple[Any, Any]


def differences(pair: tuple[Family, Family]) -> list[Setting]:
    """The settings that differ, by name. One that the file has twice, as in `schedule`, is listed once.

    Raises:
        OptOpsError: a config.json is damaged.
    """
    a, b = (_settings(each) for each in pair)
    found = [
        Setting(key=key, values=(a.get(key), b.get(key)))
        for key in sorted({*a, *b}, key=lambda key: (not key.startswith("settings."), key))
        if a.get(key) != b.get(key)
    ]
    seen: set[tuple[str, str]] = set()
    once: list[Setting] = []
    for each in found:
        name = (each.key.rpartition(".")[2], repr(each.values))
        if name not in seen:
            once.append(each)
        seen.add(name)
    return once


def _settings(of: Family) -> dict[str, Any]:
    """As its newest attempt with a config.json says; before there is one, as it was asked for."""
    config = newest_config(of.folder, of.own)
    if config is not None:
        return dict(_flat(_with_data_by_step({k: v for k, v in config.items() if k not in _OF_AN_ATTEMPT})))
    asked = of.own.state.lineage
    if asked is None:
        return {}
    pairs = (each.partition("=") for each in asked.settings)
    return {"recipe": asked.recipe, **{f"settings.{name}": value for name, _, value in pairs}}


def _with_data_by_step(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the shares of each stretch of the data under its step."""
    data = config.get("data")
    if not isinstance(data, Mapping) or not isinstance(since := data.get("since"), list):
        return config
    by_step = {
        str(each["step"]): in_words({corpus["name"]: corpus["share"] for corpus in each["corpora"]}) for each in since
    }
    return config | {"data": {**data, "since": by_step}}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
