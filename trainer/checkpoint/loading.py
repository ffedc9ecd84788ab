"""From a checkpoint of either tier into the live state, whatever layout and nodes it was saved under."""

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
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.save import Destination
from trainer.console import say
from trainer.errors import UserError

_INDEX = ".metadata"


def restore(path: Path, state: dict[str, Any], group: dist.ProcessGroup, to: Destination) -> Manifest:
    """Verify the checkpoint ``path`` and read what ``state`` names into its tensors.

    Every byte is compared with the manifest first, by all ranks together. Of a snapshot, each rank looks after what its
    node's disk holds; what a node needs and does not have comes from one that has it.

    Raises:
        CheckpointError: on all ranks, when it is missing, torn, damaged or stale.
        UserError: it holds another model, or weights alone where there is more to read.
    """
    found = on_rank_0(group, manifest.read, path)
    source = _Snapshot(path, found, group, to) if found.nodes else _Durable(path, found, group)
    reader = Reader(source.folder)
    source.need({_INDEX})
    metadata = reader.read_metadata()
    _require_same_model(state["model"], metadata.state_dict_metadata, path)
    if "optimizer" in state and not any(name.startswith("optimizer.") for name in metadata.state_dict_metadata):
        raise UserError(f"{path} holds weights alone, and nothing to resume: begin a run with --init-from {path}.")
    source.need(_files_of(state, metadata))
    load(state, storage_reader=reader, process_group=group)
    return found


class _Durable:
    """On a file system that all nodes share."""

    def __init__(self, path: Path, found: Manifest, group: dist.ProcessGroup) -> None:
        self.folder = path
        mine = sorted(found.files)[dist.get_rank() :: dist.get_world_size()]
        for why in on_all_ranks(group, lambda: [manifest.damage(path, name, found) for name in mine]):
            if any(why):
                raise CheckpointError(path, next(filter(None, why)))

    def need(self, names: set[str]) -> None:
        """All are there."""


class _Snapshot:
    """On the disks of nodes. ``folder`` is this node's; a node that had no part in it gets one."""

    def __init__(self, path: Path, found: Manifest, group: dist.ProcessGroup, to: Destination) -> None:
        place = found.nodes.get(to.node)
        folders = on_all_ranks(group, lambda: place["folder"] if place else str(to.on_disk(path)) if to.disk else "")
        if not all(folders):
            raise UserError(f"{path} is a snapshot, on the disks of nodes: --snapshot-dir says where they are.")
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
                    say(f"note: {path}: on {node}: {why}")
        for name, nodes in self._holders.items():
            if not nodes:
                raise CheckpointError(
                    path, f"{name} is on {' and '.join(found.files[name]['nodes'])}: no good copy here"
                )

    def _examine(self, names: list[str]) -> dict[str, str]:
        return {name: manifest.damage(self.folder, name, self._found) for name in names}

    def need(self, names: set[str]) -> None:
        """Bring ``names`` to where they are not: what this rank needs, its node gets."""
        needed: dict[str, set[str]] = {}
        for node, more in zip(self._nodes, on_all_ranks(self._group, lambda: names), strict=True):
            needed.setdefault(node, set()).update(more)
        transfers = transfer.to_those_who_need(self._nodes, self._holders, needed)
        on_all_ranks(self._group, transfer.exchange, transfers, self.folder, self._group)
        arrived = [each.name for each in transfers if each.target == dist.get_rank()]
        for damages in on_all_ranks(self._group, self._examine, arrived):
            if any(damages.values()):
                raise CheckpointError(self.folder, f"on its way here, {next(filter(None, damages.values()))}")


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
                f"{path} is of another model: {name} is {stored.get(name, 'absent')} there and "
                f"{live.get(name, 'absent')} here. Resume with the recipe and settings it was saved under."
            )
