"""Load a durable checkpoint or a snapshot into the live state. Layout and nodes may differ from those of the save."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from opt_ops.contract import manifest
from opt_ops.contract.manifest import CheckpointError, Manifest
from trainer.checkpoint import transfer
from trainer.checkpoint.agree import on_all_ranks, on_rank_0
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.save import Destination
from trainer.console import print_line
from trainer.errors import UserError

_INDEX = ".metadata"


def restore(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None, to: Destination) -> Manifest:
    """Verify the checkpoint ``path`` and read it into the tensors of ``state``.

    First all ranks together compare every byte with the manifest. For a snapshot, each rank checks files on the disk of
    its node. A node that lacks a file gets it from a node that has it.

    Args:
        path: the checkpoint.
        state: the tensors to fill, by the names in the checkpoint.
        group: of all ranks.
        to: where this rank's own snapshots are.

    Raises:
        CheckpointError: on all ranks, if it is missing, torn, damaged or stale.
        UserError: it holds another model, or only weights where ``state`` needs the optimizer, too.
    """
    found = on_rank_0(group, manifest.read, path)
    if _INDEX not in found.files:
        raise CheckpointError(path, f"it has no index {_INDEX}: this trainer did not write it")
    source = _Snapshot(path, found, group, to) if found.nodes else _Durable(path, found, group)
    reader = CheckpointReader(source.folder)
    source.need({_INDEX})
    metadata = reader.read_metadata()
    _require_same_model(state["model"], metadata.state_dict_metadata, path)
    if "optimizer" in state and not any(name.startswith("optimizer.") for name in metadata.state_dict_metadata):
        raise UserError(f"{path} holds only weights, so it cannot be resumed: start a run with --init-from {path}.")
    source.need(_files_of(state, metadata))
    load(state, storage_reader=reader, process_group=group)
    return found


class _Durable:
    """A durable checkpoint, on a file system that all nodes share."""

    def __init__(self, path: Path, found: Manifest, group: dist.ProcessGroup | None) -> None:
        self.folder = path
        mine = sorted(found.files)[dist.get_rank() :: dist.get_world_size()]
        for why in on_all_ranks(group, lambda: [manifest.damage(path, name, found) for name in mine]):
            if any(why):
                raise CheckpointError(path, next(filter(None, why)))

    def need(self, names: set[str]) -> None:
        """Nothing to do: all nodes have all files."""


class _Snapshot:
    """A snapshot, on the disks of nodes. ``folder`` is that of this node, even if it has no files yet."""

    def __init__(self, path: Path, found: Manifest, group: dist.ProcessGroup | None, to: Destination) -> None:
        place = found.nodes.get(to.node)
        folders = on_all_ranks(group, lambda: place["folder"] if place else str(to.on_disk(path)) if to.disk else "")
        if not all(folders):
            raise UserError(f"{path} is a snapshot on the disks of nodes: add --snapshot-dir, the folder on each node.")
        self.folder = Path(folders[dist.get_rank()])
        self._found, self._group = found, group
        self._nodes: list[str] = on_all_ranks(group, lambda: to.node)
        here = [rank for rank, node in enumerate(self._nodes) if node == to.node]
        on_disk = sorted(name for name, file in found.files.items() if to.node in file["nodes"])
        damages = on_all_ranks(group, lambda: self._examine(on_disk[here.index(dist.get_rank()) :: len(here)]))
        self._holders: dict[str, list[str]] = {name: [] for name in found.files}
        for node, examined in zip(self._nodes, damages, strict=True):
            for name, why in examined.items():
                if not why:
                    self._holders[name].append(node)
                elif dist.get_rank() == 0:
                    print_line(f"note: {path}: on {node}: {why}")
        for name, nodes in self._holders.items():
            if not nodes:
                holders = " and ".join(found.files[name]["nodes"])
                raise CheckpointError(path, f"{name} is on {holders}: this job has no good copy of it")

    def _examine(self, names: list[str]) -> dict[str, str]:
        return {name: manifest.damage(self.folder, name, self._found) for name in names}

    def need(self, names: set[str]) -> None:
        """Get the files ``names``, which this rank needs, from other nodes where this node lacks them."""
        needed: dict[str, set[str]] = {}
        for node, more in zip(self._nodes, on_all_ranks(self._group, lambda: names), strict=True):
            needed.setdefault(node, set()).update(more)
        transfers = transfer.to_those_who_need(self._nodes, self._holders, needed)
        on_all_ranks(self._group, transfer.exchange, transfers, self.folder, self._group)
        arrived = [each.name for each in transfers if each.target == dist.get_rank()]
        for damages in on_all_ranks(self._group, self._examine, arrived):
            if any(damages.values()):
                raise CheckpointError(self.folder, f"damaged in transfer: {next(filter(None, damages.values()))}")


def _files_of(state: dict[str, Any], metadata: Metadata) -> set[str]:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, is_coordinator=False)
    items = planner.create_local_plan().items
    return {os.fspath(metadata.storage_data[item.storage_index].relative_path) for item in items}


def _require_same_model(model: Mapping[str, Any], metadata: Mapping[str, Any], path: Path) -> None:
    stored = {
        name: tuple(item.size)
        for name, item in metadata.items()
        if name.startswith("model.") and isinstance(item, TensorStorageMetadata)
    }
    live = {f"model.{name}": tuple(p.shape) for name, p in model.items()}
    for name in sorted(stored.keys() | live.keys()):
        if stored.get(name) != live.get(name):
            raise UserError(
                f"{path} holds another model: {name} is {stored.get(name, 'absent')} there and "
                f"{live.get(name, 'absent')} here. Use the recipe and settings that it was saved with."
            )
