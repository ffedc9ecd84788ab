"""The settings of an attempt as MLflow's parameters: each once, by one name, numbers as people write them. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

LIMIT = 5_900  # characters; MLflow cuts parameters at 6,000

Json = Mapping[str, Any]  # an object of the trainer's: a telemetry line, or config.json. Its keys are the trainer's

_OF_THE_ATTEMPT = {"v", "attempt", "host", "ts", "resume", "lr_factors"}  # and lr_scale tells what the factors come to

# What was asked for stands in `settings`; what came of it stands beside it, and counts. The last one of a name counts.
_PLACES = (
    ("settings.parallel.", "layout."),
    ("settings.", ""),
    ("schedule.", "optim."),
    ("optimizer.", "optim."),
    ("", ""),
)


def parameters(config: Json, requested: Mapping[str, str] | None = None) -> dict[str, str]:
    """Flat settings as `optim.peak_lr: 0.001`, of an attempt's config.json and of what was requested.

    What belongs to the attempt and not to its settings is skipped: id, host, times, and what it resumed from. Two keys
    with the same last part and the same value are one setting: the first of them stays.
    """
    flat = _flatten({key: value for key, value in config.items() if key not in _OF_THE_ATTEMPT})
    named = dict(requested or {})
    for before, after in _PLACES:
        for key in [key for key in flat if key.startswith(before)]:
            named[after + key.removeprefix(before)] = flat.pop(key)
    known: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    for key, value in named.items():
        setting = (key.rpartition(".")[2], value)
        if value and setting not in known:
            found[key[:250]] = value
        known.add(setting)
    if config:
        factors = config.get("lr_factors") or []
        found["lr_scale"] = number(math.prod((factor for _, factor in factors), start=1.0))
    return found


def number(value: float) -> str:
    """A number as people write it: `7.5e-05`, and not the last digits of a float."""
    return json.dumps(_rounded(value))


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.12g}")
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _flatten(config: Json, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{re.sub(r'[^A-Za-z0-9_. /-]', '_', key)}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = (value if isinstance(value, str) else json.dumps(_rounded(value)))[:LIMIT]
    return flat
