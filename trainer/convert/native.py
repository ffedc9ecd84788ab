"""Checkpoints of this trainer that hold weights only. ``python -m trainer --init-from`` starts with them."""

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
from trainer.checkpoint.reader import CheckpointReader
from trainer.convert.weights import EMBEDDINGS, StoredParameter, Weights, checked
from trainer.errors import UserError
from trainer.recipes import ModelConfig

_PREFIX = "model."


def is_here(path: Path) -> bool:
    """Whether ``path`` is a checkpoint of this trainer, complete or not."""
    return (path / manifest.MANIFEST).is_file() or (path / manifest.MARKER).is_file()


def read(path: Path) -> Weights:
    """The parameters of the checkpoint ``path``. Every byte of it is verified first.

    Raises:
        CheckpointError: it is torn or damaged.
        UserError: it does not name its model, or does not hold an OPT.
    """
    found = manifest.verify(path)
    if found.model is None:
        raise UserError(f"{path} is from a version that did not record the model: resume it and save it once.")
    config = ModelConfig(**found.model)
    reader = CheckpointReader(path)
    entries: dict[str, StoredParameter] = {}
    for name, item in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(_PREFIX) or not isinstance(item, TensorStorageMetadata):
            continue
        ours = name.removeprefix(_PREFIX)
        rows = config.vocab_size if ours == EMBEDDINGS else item.size[0]
        dtype = item.properties.dtype
        entries[ours] = StoredParameter(
            (rows, *item.size[1:]), dtype, partial(_tensor, path, name, item.size, dtype, rows)
        )
    origin = f"this trainer's checkpoint of step {found.step}"
    return checked(Weights(origin, config, entries), path)


def write(weights: Weights, folder: Path, dtype: torch.dtype | None, progress: Callable[[int], None]) -> None:
    """Write weights and manifest into the empty ``folder``. Only one tensor at a time is in memory.

    Args:
        weights: what to write.
        folder: where. The caller renames it when it is complete.
        dtype: of the parameters; None keeps theirs. Training accepts any.
        progress: called with the bytes of each parameter that was written.

    Raises:
        OSError: a file cannot be written.
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
        # Without copies ahead, torch needs no CUDA stream beside a GPU, so another process may hold the GPU.
        files = FileSystemWriter(folder, per_thread_copy_ahead=0)
        save(state, storage_writer=files, planner=_OneByOne(tensor), no_dist=True)
    manifest.write_rank(folder, 0, [".metadata", *(file.name for file in folder.glob("*.distcp"))])
    manifest.commit(folder, ranks=1, deadline_seconds=0, header=_header(weights.config))


class _OneByOne(DefaultSavePlanner):
    """A planner for tensors without content. The content of each tensor is made when it is written."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._tensor = tensor

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._tensor(index.fqn.removeprefix(_PREFIX))


@contextmanager
def _alone() -> Iterator[None]:
    """Silence torch's warning about a single process, which is intended here."""
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
        load(state, storage_reader=CheckpointReader(path), no_dist=True)
    return state[name][:rows]
