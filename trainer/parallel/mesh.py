"""Processes, and the device mesh that they form."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.errors import UserError
from trainer.recipes import Recipe

# A peer that does not turn up or does not answer for this long is taken for dead.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many processes this one is, on the whole and on its host."""

    rank: int
    world: int
    local_rank: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The mesh of ranks, ``dp`` × ``tp``, and where this rank stands in it.

    The ranks that share layers follow each other, so they are neighbours on a node. Where parameters are replicated
    among the data-parallel ranks, the mesh has three dimensions: ``replicate`` × ``shard`` × ``tp``.
    """

    mesh: DeviceMesh
    device: torch.device
    rank: int
    world: int
    tp: int

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
        """Which shard of each layer, and of the sequence between layers, this rank has."""
        return self.rank % self.tp

    @property
    def data_mesh(self) -> DeviceMesh:
        """Over which gradients are averaged: one dimension, or (replicate, shard)."""
        return self.mesh["dp"] if self.mesh.ndim == 2 else self.mesh["replicate", "shard"]


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """Read torchrun's variables, else Slurm's, else be alone.

    Raises:
        UserError: some of torchrun's variables are set and others are not.
    """
    if "RANK" in environment:
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in environment]:
            raise UserError(
                f"RANK is set but {', '.join(missing)} is not: launch with torchrun, or set all of {needed}."
            )
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"]))
    if "SLURM_PROCID" in environment:
        return Place(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), int(environment["SLURM_LOCALID"])
        )
    return Place(0, 1, 0)


def rendezvous_from_slurm(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where a job step's tasks meet when nobody said so: its first node, and a port that its number decides."""
    first_node = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    assert first_node is not None
    number = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return first_node[1] + (first_node[2] or ""), 20_000 + number % 12_000


def address(environment: Mapping[str, str]) -> str:
    """Of rank 0's host."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    return rendezvous_from_slurm(environment)[0] if "SLURM_STEP_NODELIST" in environment else "127.0.0.1"


def node(environment: Mapping[str, str]) -> str:
    """What this node is called: as whoever started the rank says, else as Slurm or the host itself does."""
    return environment.get("OPT_OPS_NODE") or environment.get("SLURMD_NODENAME") or socket.gethostname()


def check_layout(recipe: Recipe, world: int) -> tuple[int, int]:
    """The (dp, tp) that ``world`` processes make of the recipe.

    Raises:
        UserError: heads, vocabulary or sequence cannot be divided that way, there are more data-parallel ranks than
            sequences in the batch, or the world has another size.
    """
    tp = recipe.parallel.tp
    dp = recipe.parallel.dp or max(1, world // tp)
    if dp * tp != world:
        raise UserError(
            f"{world} processes cannot form parallel.dp={recipe.parallel.dp} × parallel.tp={tp}: "
            "start dp × tp of them, or leave dp at 0 and start a multiple of tp."
        )
    for name, value in (
        ("model.num_heads", recipe.model.num_heads),
        ("the padded model.vocab_size", recipe.model.padded_vocab_size),
        ("data.seq_len", recipe.data.seq_len),
    ):
        if value % tp:
            raise UserError(f"{name}={value} is not a multiple of parallel.tp={tp}, so ranks cannot share it evenly.")
    if recipe.data.global_batch < dp:
        raise UserError(
            f"data.global_batch={recipe.data.global_batch} leaves some of {dp} data-parallel ranks without a sequence: "
            "start fewer, or raise parallel.tp."
        )
    return dp, tp


def start(place: Place, dp: int, tp: int, replicas: int = 1) -> Layout:
    """Join the process group and form the mesh. A process that is alone needs no address or port.

    Raises:
        torch.distributed.DistError: the other processes did not come.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Sums in another order round differently: what a run computes must not depend on the number of cores.
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if place.world == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  documented, but not listed in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        method = "env://" if "MASTER_ADDR" in os.environ else "tcp://{}:{}".format(*rendezvous_from_slurm(os.environ))
        dist.init_process_group(backend, init_method=method, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    if replicas == 1:
        mesh = init_device_mesh(device.type, (dp, tp), mesh_dim_names=("dp", "tp"))
    else:
        mesh = init_device_mesh(
            device.type, (replicas, dp // replicas, tp), mesh_dim_names=("replicate", "shard", "tp")
        )
    return Layout(mesh, device, place.rank, place.world, tp)


def require_agreement(what: str, value: str) -> None:
    """Stop unless all ranks have the same ``value``: ranks that train on different data or code do so in silence.

    Raises:
        UserError: on every rank, naming those that differ from rank 0.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if strangers := [rank for rank, other in enumerate(values) if other != values[0]]:
        raise UserError(f"{what} differs between ranks: ranks {strangers} have another than rank 0. Start all alike.")
