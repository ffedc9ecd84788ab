"""Weights on disk, whatever their format: a shape, and parameters by our names that are read one at a time."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model.opt import OPT, POSITION_OFFSET
from trainer.recipes import ModelConfig

EMBEDDINGS = "embed_tokens.weight"

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter on disk. ``load`` reads it, whole and unpadded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model on disk: where it comes from, in words; its shape; its parameters, the tied matrix once."""

    origin: str
    config: ModelConfig
    entries: Mapping[str, Entry]


def published_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter, without the rows that pad the vocabulary."""
    with torch.device("meta"):
        model = OPT(config, seed=0)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        yield name, (config.vocab_size, *shape[1:]) if name == EMBEDDINGS else shape


def checked(weights: Weights, path: Path) -> Weights:
    """``weights`` in the order of the model, if they are the parameters of such a model and nothing else.

    Raises:
        UserError: a parameter is missing, of another shape, or unknown.
    """
    expected = dict(published_shapes(weights.config))
    found = {name: entry.shape for name, entry in weights.entries.items()}
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {name} is {found.get(name, 'absent')} there, and {expected.get(name, 'absent')} in an OPT of "
                f"{weights.config.num_layers} layers of {weights.config.hidden_size} ({weights.config.norm}-LN). "
                "Not an OPT, or a part is missing."
            )
    return replace(weights, entries={name: weights.entries[name] for name in expected})


def shape_of(shapes: Mapping[str, tuple[int, ...]], heads: int, path: Path) -> ModelConfig:
    """The model that has parameters of these ``shapes``, which tell all but the number of heads.

    Raises:
        UserError: there are no embeddings or layers.
    """
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if not layers or EMBEDDINGS not in shapes or "embed_positions.weight" not in shapes:
        raise UserError(f"{path}: no embeddings, or no layers: not the weights of an OPT.")
    vocab_size, width = shapes[EMBEDDINGS]
    positions, size = shapes["embed_positions.weight"]
    return ModelConfig(
        vocab_size=vocab_size,
        max_positions=positions - POSITION_OFFSET,
        num_layers=max(layers) + 1,
        hidden_size=size,
        num_heads=heads,
        dropout=0.1,
        norm="pre" if "final_layer_norm.weight" in shapes else "post",
        embed_size=0 if width == size else width,
    )


def sync_tree(folder: Path) -> None:
    """Have all files in ``folder`` on disk before the folder gets its name."""
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object.")
    return content
