"""What peer copies cost: host memory, and time on the way to the host and to the buddy.

All of it is arithmetic. The bandwidths are those of :mod:`trainer.plan.hardware`. The network's is what collectives
reach; copies go over TCP, which may reach less. So a run measures its own copies and chooses their interval by that.
"""

import math
from dataclasses import dataclass

from trainer.model import cost
from trainer.parallel.memory import MASTER, MOMENTS
from trainer.plan.estimate import PlannedLayout
from trainer.plan.hardware import GpuModel
from trainer.recipes import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerCopyCost:
    """What copies cost in one layout.

    Attributes:
        every: updates between two copies; 0: no copies.
        gb_per_gpu: GB of one copy: weights and moments of the share.
        to_host_seconds: from the GPU to its host.
        to_buddy_seconds: from there to the host of the buddy.
        traffic_share: bytes to the buddy in each update, as a share of FSDP's own traffic at least (8 bytes for each
            parameter that a tensor-parallel rank holds).
        host_gb_per_gpu: host memory for the own versions and for those of the ward.
        host_gb_per_node: the same for all GPUs of a node.
    """

    every: int
    gb_per_gpu: float
    to_host_seconds: float
    to_buddy_seconds: float
    traffic_share: float
    host_gb_per_gpu: float
    host_gb_per_node: float


def interval(copy_seconds: float, step_seconds: float) -> int:
    """After how many updates a copy is made, so that one takes at most half of the time between two.

    Args:
        copy_seconds: to copy a rank's state to its host, and from there to the buddy.
        step_seconds: of an update.
    """
    return max(1, math.ceil(copy_seconds / (step_seconds / 2))) if step_seconds > 0 else 1


def peer_copy_cost(recipe: Recipe, gpu: GpuModel, layout: PlannedLayout, step_seconds: float) -> PeerCopyCost:
    """The cost of peer copies. A run on one GPU makes none.

    Args:
        recipe: for its settings, and the size of the model.
        gpu: for its bandwidths.
        layout: the ranks, and how they share the work.
        step_seconds: of an update.
    """
    held = cost.parameters(recipe.model) / layout.tp
    gb = (MASTER + MOMENTS) * held * recipe.parallel.replicas / layout.dp / 1e9
    to_host = gb * gpu.per_node / gpu.host_bandwidth if layout.offload else gb / gpu.host_link
    to_buddy = gb / (gpu.network if layout.nodes > 1 else gpu.host_bandwidth / gpu.per_node)
    rule = recipe.peer_copies
    every = rule.every if rule.every >= 0 else interval(to_host + to_buddy, step_seconds)
    every = every if layout.dp * layout.tp > 1 else 0
    memory = 2 * rule.versions * gb if every else 0.0
    return PeerCopyCost(
        every=every,
        gb_per_gpu=gb,
        to_host_seconds=to_host,
        to_buddy_seconds=to_buddy,
        traffic_share=gb * 1e9 / every / (8 * held) if every else 0.0,
        host_gb_per_gpu=memory,
        host_gb_per_node=memory * gpu.per_node,
    )
