"""What must be equal in all sizes of a campaign, and what the size decides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

_BY_SIZE = re.compile(
    r"steps|model\.(num_layers|hidden_size|num_heads|embed_size|norm|init_std|parameters)"
    r"|optim\.(peak_lr|warmup_steps|total_steps|decay_steps)|data\.(global_batch|micro_batch)"
    r"|(parallel|checkpoint|peer_copies|loss_scale)\..*"
    r"|engine|checkpoint_activations|compile|kernels|deterministic"
    r"|checkpoint_every|evaluate_every|evaluate_sequences|log_every|checksum_every"
)
"""Settings that the size decides (its shape, the learning rate and batch that suit it), and those that change no loss:
how ranks share the work, and what is saved and written how often."""

_OF_DATA = ("digest", "tokenizer")


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that must be equal and are not, by dotted keys: name, and both values."""
    return [
        (key, first.get(key), other.get(key))
        for key in sorted({*first, *other})
        if not _BY_SIZE.fullmatch(key) and _plain(first.get(key)) != _plain(other.get(key))
    ]


def must_be_equal(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of what must be equal: the settings, and the digests of data and tokenizer."""
    found = dict(_flat(_mapping(config.get("settings"))))
    data = _mapping(config.get("data"))
    return found | {f"data {name}": data[name] for name in _OF_DATA if name in data}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _plain(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
