"""New groups under a living engine. Everything here that touches private names of torch was read in torch 2.13.

DTensors, device meshes and compiled code find their groups by name. So it is enough to make groups of the same names
and to replace the few places that keep a group itself. After an error in a collective, in this order:

1. cut the connections (:class:`trainer.recovery.connections.Connections`), so that nothing is in flight;
2. drop the loss and the error with its traceback: they keep the autograd graph, which keeps the old groups;
3. :func:`abort`, then :func:`trainer.parallel.mesh.start` with the new meeting;
4. :func:`rewire`, then :func:`drop_broken_step`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout

# What gloo, torch's store and NCCL say when a peer is lost or a connection is cut. The texts of gloo and of the store
# were read in torch 2.13, those of NCCL in its documentation. A fault of the program reads differently.
_LOST = re.compile(
    r"Connection (closed by peer|reset|refused|timed out|was likely closed)|Read error \[|writev \[|Broken pipe"
    r"|Gloo connectFullMesh failed|Application timeout caused pair closure|Timed out waiting \d+ms for (recv|send)"
    r"|Socket (closed|unexpectedly closed|Timeout)|Connect timeout|Remote peer closed the connection"
    r"|Failed to (recv|send), (got|sent) 0 bytes|client socket has (failed|timed out)"
    r"|NCCL communicator (was|is|has been) aborted|remote process exited or there was a network error"
    r"|nccl(RemoteError|SystemError)|unhandled system error|Watchdog caught collective operation timeout"
)


def supported() -> str | None:
    """Why this torch cannot rebuild groups in place: one line. None if it can."""
    if not hasattr(FSDPModule, "reset_iter_state"):
        return f"recovery in place needs torch 2.13: FSDPModule.reset_iter_state is missing in {_torch_version()}"
    if not hasattr(distributed_c10d, "_abort_process_group"):
        return f"recovery in place needs torch's _abort_process_group, which is missing in {_torch_version()}"
    return None


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says that a peer is lost or a connection was cut, and not that the program is at fault.

    Args:
        error: from a forward or backward pass, a collective, the exchange of objects or the forming of groups.
    """
    if isinstance(error, CheckpointException):  # of all ranks, by rank
        return any(is_lost_peer(failure) for failure, _ in error.failures.values())
    if error.__cause__ is not None and is_lost_peer(error.__cause__):
        return True
    if isinstance(error, dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def communicators() -> list[dist.ProcessGroup]:
    """The groups of this process that have NCCL, the newest first: those that :func:`stop` is for."""
    names = distributed_c10d._world.pg_names
    return [group for group in sorted(names, key=names.__getitem__, reverse=True) if "nccl" in dist.get_backend(group)]


def stop(communicators: Sequence[dist.ProcessGroup]) -> None:
    """End NCCL's collectives in flight, on all of these groups at once. Their results are wrong then.

    Any thread may call it. The groups stay known until :func:`abort`, so the thread that waits finds what it expects
    until it raises. torch's own watch must be off (``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``): it would end the process.
    """
    if not communicators:
        return
    backend: Any = communicators[0]._get_backend(torch.device("cuda"))
    backend._group_start()  # as one call: else one abort may wait for another for ever (pytorch/pytorch#119797)
    for group in communicators:
        group.abort()
    backend._group_end()


def abort() -> None:
    """Leave all groups of this process. Then it can form groups again, which get the same names.

    The connections must have been cut: gloo's threads end when a group is freed, and that waits for what is in flight.
    A group is freed when nothing keeps it any more: :func:`rewire` replaces what the engine keeps.
    """
    if dist.is_initialized():
        distributed_c10d._abort_process_group()
    else:  # a first group that could not be formed was counted: the next would get another name than on new ranks
        distributed_c10d._world.group_count = 0


def rewire(engine: Engine, layout: Layout) -> None:
    """Let ``engine`` work with the groups of ``layout``, which were made in the order of those that it had.

    Its tensors keep their mesh, which finds the new groups by their names. ``engine.layout`` becomes ``layout`` with
    that mesh. Compiled code stays. It keeps the groups that it was compiled with, once, and does not use them. So their
    store stays open, and each generation needs a port of its own.

    Raises:
        RuntimeError: this engine cannot use them: it is not FSDP2, or the groups have other names or other ranks.
    """
    if not _mesh_infos(engine):
        raise RuntimeError("only the groups of engine=fsdp2 can be replaced: build the engine again.")
    mesh = engine.layout.mesh
    if _shape(mesh) != _shape(layout.mesh) or engine.layout.rank != layout.rank:
        raise RuntimeError(
            f"the engine's groups cannot be replaced: they were {_shape(mesh)} on rank {engine.layout.rank}, and now "
            f"are {_shape(layout.mesh)} on rank {layout.rank}. Build the engine again."
        )
    for root in _root_meshes(engine):
        root._pg_registry = {name: layout.mesh._pg_registry[name] for name in root._pg_registry}
    for info in _mesh_infos(engine):
        for dimension, name in ((info.shard_mesh_dim, "shard"), (info.replicate_mesh_dim, "replicate")):
            if dimension is not None:
                setattr(info, f"{name}_process_group", info.mesh.get_group(dimension))
    for module in engine.model.modules():
        if getattr(module, "group", None) is not None:
            setattr(module, "group", mesh["tp"].get_group())  # noqa: B010  a module of ours, and no Tensor or Module
    engine.layout = replace(layout, mesh=mesh)


def drop_broken_step(engine: Engine) -> None:
    """Undo what a step that was broken off has left in the engine: gathered layers, pending sums, gradients.

    ``reset_iter_state`` leaves the gradients of gathered parameters: the next backward pass would add to them.
    """
    for group in _parameter_groups(engine):
        if (gathering := group._all_gather_result) is not None:  # nothing is in flight any more, and a wait would raise
            group._all_gather_result = gathering._replace(all_gather_work=None)
    if isinstance(engine.model, FSDPModule):
        if engine.model._get_fsdp_state()._is_root:
            engine.model.reset_iter_state()
        else:  # before the first forward pass there is no root yet
            for group in _parameter_groups(engine):
                group._reset_iter_state()
    for group in _parameter_groups(engine):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # since it was gathered for the first time
                parameter._unsharded_param.grad = None
    engine.zero_grad()


def _parameter_groups(engine: Engine) -> Iterator[Any]:
    """FSDP's groups of parameters, which are gathered together: one for each layer, and one for the rest."""
    for module in engine.model.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups


def _mesh_infos(engine: Engine) -> list[Any]:
    """All places where FSDP keeps the groups of ranks themselves."""
    keepers = [keeper for group in _parameter_groups(engine) for keeper in (group, *group.fsdp_params)]
    infos = [info for keeper in keepers for info in (keeper.mesh_info, keeper.post_forward_mesh_info) if info]
    return list({id(info): info for info in infos}.values())


def _root_meshes(engine: Engine) -> list[DeviceMesh]:
    """The meshes that keep the groups. A tensor may have an equal one of an earlier engine in this process."""
    tensors = [parameter for parameter in engine.model.parameters() if isinstance(parameter, DTensor)]
    meshes = [tensor.device_mesh for tensor in tensors] + [info.mesh for info in _mesh_infos(engine)]
    return list({id(root): root for root in [mesh._get_root_mesh() for mesh in [engine.layout.mesh, *meshes]]}.values())


def _shape(mesh: DeviceMesh) -> tuple[Any, ...]:
    return mesh.mesh_dim_names, tuple(mesh.shape), tuple(mesh._dim_group_names)


def _torch_version() -> str:
    return f"torch {torch.__version__}"
