"""The files that hold the state of a model in plain PyTorch: weights, optimizer, random numbers.

Of a model that is whole on every rank, rank 0 saves ``model.pt`` and ``optimizer.pt``. Of a sharded one, all ranks save
their part by ``torch.distributed.checkpoint``. Each rank saves its own random numbers.
"""

import math
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from opt_ops.contract import UserError
from opt_ops.integrations.checkpoints import Written

MODEL = "model.pt"
OPTIMIZER = "optimizer.pt"
_INDEX = ".metadata"


class StateFiles(Protocol):
    """How the state of a model and its optimizer is saved."""

    def write(self, path: Path, *, weights_moved: bool) -> Written:
        """Write the part of this rank into ``path``. ``weights_moved``: since the save before."""
        ...

    def load(self, path: Path) -> None:
        """Load all of it."""
        ...

    def load_weights(self, path: Path) -> None:
        """Load the weights alone."""
        ...


def state_files(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None, rank: int
) -> StateFiles:
    """How to save ``model`` and ``optimizer``. ``state``: what the script itself gives to be saved in shards."""
    if state is None and not is_sharded(model):
        return WholeFiles(model, optimizer, rank)
    return ShardFiles(model, state or {"train": ShardedState(model, optimizer)}, rank)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a rank has only a part of the parameters."""
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``: its names are the same with and without."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inside
        else:
            return model


class WholeFiles:
    """``model.pt`` and ``optimizer.pt``, written by rank 0."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
        self._model, self._optimizer, self._rank = bare(model), optimizer, rank

    def write(self, path: Path, *, weights_moved: bool) -> Written:
        """See :class:`StateFiles`."""
        if self._rank != 0:
            return Written(frozenset())
        _save(self._model.state_dict(), path / MODEL)
        _save(self._optimizer.state_dict(), path / OPTIMIZER)
        # An optimizer without moments has settings only, and these may stay the same.
        changed = [MODEL] * weights_moved + [OPTIMIZER] * (weights_moved and any(self._optimizer.state.values()))
        return Written(frozenset({MODEL, OPTIMIZER}), frozenset(changed))

    def load(self, path: Path) -> None:
        """See :class:`StateFiles`."""
        self.load_weights(path)
        try:
            self._optimizer.load_state_dict(_read(path, OPTIMIZER))
        except (ValueError, KeyError) as error:
            raise UserError(f"the optimizer is not the one in {path}: {error}") from error

    def load_weights(self, path: Path) -> None:
        """See :class:`StateFiles`."""
        try:
            self._model.load_state_dict(_read(path, MODEL))
        except RuntimeError as error:
            raise UserError(f"the model is not the one in {path}: {error}") from error


class ShardedState(Stateful):
    """A model and its optimizer as ``torch.distributed.checkpoint`` takes them, under any parallelism of torch."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, by full names."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over."""
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )


class ShardFiles:
    """Shards by ``torch.distributed.checkpoint``, one file a rank."""

    def __init__(self, model: torch.nn.Module, state: Mapping[str, Any], rank: int) -> None:
        self._state, self._rank = dict(state), rank
        self._alone = not dist.is_initialized()
        self._trained = {name for name, parameter in bare(model).named_parameters() if parameter.requires_grad}

    def write(self, path: Path, *, weights_moved: bool) -> Written:
        """See :class:`StateFiles`."""
        try:
            index = save(self._state, storage_writer=FileSystemWriter(path), no_dist=self._alone)
        except CheckpointException as error:  # not an Exception
            raise OSError(f"a rank could not write its shard: {_first_line(error)}") from error
        mine = {file.name for file in path.glob(f"__{self._rank}_*.distcp")}
        state = mine & self._with_trained_tensors(index) if weights_moved else set()
        return Written(frozenset(mine | ({_INDEX} if self._rank == 0 else set())), frozenset(state))

    def load(self, path: Path) -> None:
        """See :class:`StateFiles`."""
        try:
            load(self._state, storage_reader=FileSystemReader(path), no_dist=self._alone)
        except CheckpointException as error:
            raise UserError(f"{path} cannot be loaded into this model: {_first_line(error)}") from error

    def load_weights(self, path: Path) -> None:
        """See :class:`StateFiles`."""
        raise UserError(f"--init-from {path} is not supported for a sharded model: leave it out.")

    def _with_trained_tensors(self, index: Metadata) -> set[str]:
        """The shards that hold a trained parameter or its optimizer state. The others may be equal in every save."""
        stored: Mapping[Any, Any] = index.storage_data
        return {info.relative_path for index, info in stored.items() if self._is_trained(index.fqn)}

    def _is_trained(self, name: str) -> bool:
        """Whether ``name`` is that of a trained parameter, after a prefix, or of its optimizer state."""
        parts = [part for part in name.split(".") if part not in ("_fsdp_wrapped_module", "_orig_mod")]
        ends = (len(parts), len(parts) - 1)
        return any(".".join(parts[i:end]) in self._trained for end in ends for i in range(end))


def _first_line(error: CheckpointException) -> str:
    failures = error.failures
    rank, (what, _) = next(iter(failures.items()))
    return f"rank {rank}: {type(what).__name__}: {what}"


def _save(state: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would not say why it cannot write
        torch.save(state, file)


def _read(path: Path, name: str) -> Any:
    try:
        return torch.load(path / name, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} has no {name}: it was saved by another trainer, or by sharded training.") from None


def gradient_norm(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    """The norm of all gradients, over all ranks. Then they are clipped to ``clip_norm``; 0: they are not.

    Raises:
        UserError: there are no gradients.
    """
    if isinstance(model, FullyShardedDataParallel):
        return float(model.clip_grad_norm_(clip_norm or math.inf))
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in everything if parameter.grad is not None]
    if not trained:
        raise UserError("no parameter of the optimizer has a gradient: does the loss depend on the model?")
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    return float(norm)


def write_random(path: Path, rank: int) -> str:
    """Save the random numbers of this rank: Python's, numpy's where it was imported, torch's. The name of the file."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if numpy := sys.modules.get("numpy"):
        kind, keys, *others = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *others)
    _save(state, path / _random_file(rank))
    return _random_file(rank)


def load_random(path: Path, rank: int) -> bool:
    """Restore them. False where the checkpoint has none of this rank."""
    if not (path / _random_file(rank)).exists():
        return False
    state = _read(path, _random_file(rank))
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        numpy.random.set_state(state["numpy"])
    return True


def _random_file(rank: int) -> str:
    return f"random-{rank:04d}.pt"
