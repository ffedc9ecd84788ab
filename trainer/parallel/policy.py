"""How FSDP2 treats gradients and weights within an update. The engine does what it says, and the plan counts with it.

An update has one or more micro-batches. ``whole`` means that a rank's shard is the whole parameter: dp = replicas.

====================  ======================================  =========================================
layout                gradients are summed over ranks         gathered weights are kept
====================  ======================================  =========================================
offload               after each micro-batch                  never: each pass gathers them
whole                 after the last micro-batch              if they fit
spread, recomputed    after each micro-batch                  never
spread                after the last micro-batch              if they fit; never on a CPU
====================  ======================================  =========================================

Until they are summed over ranks, gradients are the whole ones of each parameter, in fp32 (4 bytes a parameter). Where
the shard is the whole parameter, that is the memory that the summed gradients need anyway. So an early sum would save
nothing there. Recomputation and offload show that memory is short.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from trainer.parallel import memory
from trainer.recipes import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpPolicy:
    """What FSDP2 does between the first and the last pass of an update.

    Attributes:
        reduces_each: gradients are summed over ranks after each micro-batch, not only after the last one.
        keeps_weights: gathered weights stay from the first forward pass to the last backward pass. Without this, each
            pass casts the master weights and gathers them again.
    """

    reduces_each: bool
    keeps_weights: bool


def choose(
    recipe: Recipe, dp: int, gpu_memory: float | None = None, fused: AbstractSet[str] = frozenset()
) -> FsdpPolicy:
    """The policy for ``recipe`` on ``dp`` data-parallel ranks.

    Args:
        recipe: with ``parallel.tp`` and all other settings of the run.
        dp: number of data-parallel ranks.
        gpu_memory: bytes of each GPU. None on a CPU.
        fused: the ops that run as kernels.
    """
    whole, offload = dp == recipe.parallel.replicas, recipe.parallel.offload
    reduces_each = offload or (recipe.checkpoint_activations and not whole)
    keeps = not reduces_each and (whole if gpu_memory is None else _fit(recipe, dp, gpu_memory, fused))
    return FsdpPolicy(reduces_each=reduces_each, keeps_weights=keeps)


def _fit(recipe: Recipe, dp: int, gpu_memory: float, fused: AbstractSet[str]) -> bool:
    needs = memory.on_gpu(recipe, dp, reduces_each=False, keeps_weights=True, fused=fused)
    return needs.total <= (1 - memory.OVERHEAD) * gpu_memory
