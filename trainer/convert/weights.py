"""Weights on disk, in any format: the shape of the model, and its parameters by our names, read one at a time."""

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
class StoredParameter:
    """One parameter on disk. ``load`` reads it, whole and without padding."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model on disk.

    Attributes:
        origin: its format, for people.
        config: its shape.
        entries: its parameters by name. The tied matrix appears once.
    """

    origin: str
    config: ModelConfig
    entries: Mapping[str, StoredParameter]


def published_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of a model, without the rows that pad the vocabulary."""
    with torch.device("meta"):
        model = OPT(config, seed=0)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        yield name, (config.vocab_size, *shape[1:]) if name == EMBEDDINGS else shape


def checked(weights: Weights, path: Path) -> Weights:
    """Check that ``weights`` are the parameters of their model, and return them in its order.

    Raises:
        UserError: a parameter is missing, has another shape, or is unknown.
    """
    expected = dict(published_shapes(weights.config))
    found = {name: entry.shape for name, entry in weights.entries.items()}
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {name} is {found.get(name, 'absent')} there, and {expected.get(name, 'absent')} in an OPT of "
                f"{weights.config.num_layers} layers of {weights.config.hidden_size} ({weights.config.norm}-LN). "
                "It is not an OPT, or a part of it is missing."
            )
    return replace(weights, entries={name: weights.entries[name] for name in expected})


def shape_of(shapes: Mapping[str, tuple[int, ...]], heads: int, path: Path) -> ModelConfig:
    """The model whose parameters have these ``shapes``. They show everything but the number of heads.

    Raises:
        UserError: there are no embeddings or no layers.
    """
    layers = {int(match[1]) for name in shapes if (match := _LAYER.match(name))}
    if not layers or EMBEDDINGS not in shapes or "embed_positions.weight" not in shapes:
        raise UserError(f"{path}: there are no embeddings or no layers, so these are not the weights of an OPT.")
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
    """Sync ``folder`` and all files in it.

    Raises:
        OSError: a file cannot be synced.
    """
    for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object.")
    return content
