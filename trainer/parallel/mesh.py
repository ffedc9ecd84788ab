"""The process group, and the device mesh that its ranks form."""

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opt_ops.contract.environment import MASTER_ADDR, Place, rendezvous_from_slurm
from trainer import device
from trainer.errors import UserError
from trainer.preconditions import check_layout

__all__ = ["TIMEOUT", "Layout", "Meeting", "check_layout", "require_agreement", "start"]

# A peer that does not come or does not answer for this long is considered dead.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh of ranks, ``dp`` × ``tp``, and the place of this rank in it.

    Ranks that share layers have consecutive numbers, so they are on the same node. Where data-parallel ranks hold
    replicas of the parameters, the mesh has three dimensions: ``replicate`` × ``shard`` × ``tp``.

    Attributes:
        mesh: of all ranks.
        host: the group of all ranks for what the host exchanges: objects and files. It is the only one with gloo.
        device: where this rank computes.
        rank: number of this rank.
        world: number of ranks.
        tp: number of ranks that share layers.
        gpu_memory: bytes of the smallest GPU of all ranks; None on CPUs. Ranks must follow one policy, or their
            collectives would not match.
    """

    mesh: DeviceMesh
    host: dist.ProcessGroup
    device: torch.device
    rank: int
    world: int
    tp: int
    gpu_memory: float | None = None

    @property
    def dp(self) -> int:
        """Number of ranks that share a batch."""
        return self.world // self.tp

    @property
    def dp_rank(self) -> int:
        """Which share of the batch this rank trains on."""
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        """Which shard of each layer this rank holds, and which shard of the sequence between layers."""
        return self.rank % self.tp

    @property
    def data_mesh(self) -> DeviceMesh:
        """The part of the mesh over which gradients are averaged: one dimension, or (replicate, shard)."""
        return self.mesh["dp"] if self.mesh.ndim == 2 else self.mesh["replicate", "shard"]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a later generation of the membership meet.

    Attributes:
        address: the host of rank 0, which owns the store of this generation. The store ends with rank 0.
        port: of the store.
        generation: the names in the store begin with it, so a rank of another generation can join no group.
        timeout: how long a rank tries to reach the store. Cutting its connections ends every later wait.
    """

    address: str
    port: int
    generation: int
    timeout: timedelta = TIMEOUT


def start(place: Place, dp: int, tp: int, replicas: int = 1, meeting: Meeting | None = None) -> Layout:
    """Select the device, join the process group and form the mesh. A single process needs no address or port.

    On GPUs the groups of the mesh have NCCL alone, and their communicators exist before the first step. Each gloo group
    costs a rank a socket for each other rank, so there is one.

    A process may form groups again after :func:`trainer.recovery.rebuild.abort`. The groups are made in the same order
    each time, so they get the same names. Tensors and compiled code find them by these names.

    Args:
        place: of this rank.
        dp: number of data-parallel ranks.
        tp: number of ranks that share layers.
        replicas: number of replicas of the parameters.
        meeting: of a later generation. None: the first one, which meets where the environment says.

    Raises:
        torch.distributed.DistError: the other processes did not come.
    """
    chosen = device.select(place.local_rank)
    if not chosen.is_gpu:
        device.use_one_cpu_thread()
    # With a device, NCCL connects at once, and the groups of the mesh are split from the first one.
    device_id = chosen.torch_device if chosen.is_gpu else None
    common = partial(dist.init_process_group, chosen.backend, timeout=TIMEOUT, device_id=device_id)
    if place.world == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  documented, but not listed in __all__
        common(store=store, rank=0, world_size=1)
    elif meeting:
        common(store=_store(place, meeting), rank=place.rank, world_size=place.world)
    else:
        method = "env://" if MASTER_ADDR in os.environ else "tcp://{}:{}".format(*rendezvous_from_slurm(os.environ))
        common(init_method=method, rank=place.rank, world_size=place.world)
    host = dist.new_group(backend="gloo", timeout=TIMEOUT) if chosen.is_gpu else dist.group.WORLD
    assert isinstance(host, dist.ProcessGroup)
    kind = chosen.torch_device.type
    if replicas == 1:
        mesh = init_device_mesh(kind, (dp, tp), mesh_dim_names=("dp", "tp"))
    else:
        mesh = init_device_mesh(kind, (replicas, dp // replicas, tp), mesh_dim_names=("replicate", "shard", "tp"))
    # Here and not where an engine is built: ranks that keep their engine take part in it, too.
    memory = _smallest_memory(chosen.torch_device) if chosen.is_gpu else None
    return Layout(mesh, host, chosen.torch_device, place.rank, place.world, tp, memory)


def _smallest_memory(gpu: torch.device) -> float:
    size = torch.tensor(torch.cuda.get_device_properties(gpu).total_memory, dtype=torch.float64, device=gpu)
    dist.all_reduce(size, dist.ReduceOp.MIN)
    return size.item()


def _store(place: Place, meeting: Meeting) -> PrefixStore:
    """The store of a generation. Rank 0 serves it, on all of its addresses."""
    served = TCPStore(
        meeting.address,
        meeting.port,
        place.world,
        is_master=place.rank == 0,
        wait_for_workers=False,  # the group waits for all of them anyway
        timeout=meeting.timeout,
    )
    return PrefixStore(f"g{meeting.generation}", served)


def require_agreement(what: str, value: str, group: dist.ProcessGroup | None = None) -> None:
    """Compare ``value`` over all ranks. Without this, ranks could train on different data or code unnoticed.

    Args:
        what: the name of the value, for the message.
        value: of this rank.
        group: of all ranks, for what the host exchanges (default: the default group).

    Raises:
        UserError: on every rank, if the values differ. The message names the ranks that differ from rank 0.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    if differing := [rank for rank, other in enumerate(values) if other != values[0]]:
        raise UserError(
            f"{what} differs between ranks: ranks {differing} have other values than rank 0. Start all ranks alike."
        )
