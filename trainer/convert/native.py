"""This trainer's own checkpoints, with weights alone: ``python -m trainer --init-from`` begins with them."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from opt_ops.contract import manifest
from trainer.checkpoint.reader import Reader
from trainer.convert.weights import EMBEDDINGS, Entry, Weights, checked
from trainer.errors import UserError
from trainer.recipes import ModelConfig

_PREFIX = "model."


def is_here(path: Path) -> bool:
    """Whether ``path`` is one of the trainer's checkpoints, whole or not."""
    return (path / manifest.MANIFEST).is_file() or (path / manifest.MARKER).is_file()


def read(path: Path) -> Weights:
    """The parameters of the checkpoint ``path``, every byte of which is verified first.

    Raises:
        CheckpointError: it is torn or damaged.
        UserError: it does not say what model it is of.
    """
    found = manifest.verify(path)
    if found.model is None:
        raise UserError(f"{path} was saved before checkpoints said what model they are of: resume it and save once.")
    config = ModelConfig(**found.model)
    reader = Reader(path)
    entries: dict[str, Entry] = {}
    for name, item in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(_PREFIX) or not isinstance(item, TensorStorageMetadata):
            continue
        ours = name.removeprefix(_PREFIX)
        rows = config.vocab_size if ours == EMBEDDINGS else item.size[0]
        dtype = item.properties.dtype
        entries[ours] = Entry((rows, *item.size[1:]), dtype, partial(_tensor, path, name, item.size, dtype, rows))
    origin = f"this trainer's checkpoint of step {found.step}"
    return checked(Weights(origin, config, entries), path)


def write(weights: Weights, folder: Path, dtype: torch.dtype | None, progress: Callable[[int], None]) -> None:
    """Write weights and manifest into the empty ``folder``, whose tensors are never in memory all at once.

    Args:
        weights: what to write.
        folder: where; the caller names it when all is there.
        dtype: of the parameters; None keeps theirs. Training reads any into its own.
        progress: told the bytes of each parameter once it is written.
    """
    sizes = {name: _padded(weights.config, name, entry.shape) for name, entry in weights.entries.items()}
    state = {
        _PREFIX + name: torch.empty(sizes[name], dtype=dtype or entry.dtype, device="meta")
        for name, entry in weights.entries.items()
    }

    def tensor(name: str) -> Tensor:
        content = weights.entries[name].load()
        whole = torch.zeros(sizes[name], dtype=dtype or content.dtype)
        whole[: len(content)] = content
        progress(whole.nbytes)
        return whole

    with _alone():
        save(state, storage_writer=FileSystemWriter(folder), planner=_OneByOne(tensor), no_dist=True)
    manifest.write_rank(folder, 0, [".metadata", *(file.name for file in folder.glob("*.distcp"))])
    manifest.commit(folder, ranks=1, deadline_seconds=0, header=_header(weights.config))


class _OneByOne(DefaultSavePlanner):
    """Plans by tensors without content, and has the content of each made when it is written."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensor(index.fqn.removeprefix(_PREFIX))


@contextmanager
def _alone() -> Iterator[None]:
    """Torch warns of a single process, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _header(config: ModelConfig) -> Mapping[str, Any]:
    return {
        "step": 0,
        "attempt": "converted",
        "ts": time.time(),
        "layout": {"world": 1, "dp": 1, "tp": 1},
        "data_position": 0,
        "tokens": 0,
        "settings_digest": "",
        "telemetry": {},
        "model": asdict(config),
    }


def _padded(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (config.padded_vocab_size, *shape[1:]) if name == EMBEDDINGS else shape


def _tensor(path: Path, name: str, size: torch.Size, dtype: torch.dtype, rows: int) -> Tensor:
    state = {name: torch.empty(size, dtype=dtype)}
    with _alone():
        load(state, storage_reader=Reader(path), no_dist=True)
    return state[name][:rows]
