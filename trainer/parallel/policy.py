"""How FSDP2 treats gradients and weights within an update. The engine does what it says, and the plan counts with it.

An update has one or more micro-batches. ``whole`` means that a rank's shard is the whole parameter: dp = replicas.

====================  ======================================  =========================================
layout                gradients are summed over ranks         half-precision weights are kept
====================  ======================================  =========================================
offload               after each micro-batch                  never: each pass gathers them
whole                 after the last micro-batch              from the first pass to the last one
spread, recomputed    after each micro-batch                  never
spread                after the last micro-batch              never
====================  ======================================  =========================================

Until they are summed over ranks, gradients are the whole ones of each parameter, in fp32 (4 bytes a parameter). Where
the shard is the whole parameter, that is the memory that the summed gradients need anyway. So an early sum would save
nothing there. Recomputation and offload show that memory is short.
"""

from dataclasses import dataclass

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


def choose(recipe: Recipe, dp: int) -> FsdpPolicy:
    """The policy for ``recipe`` on ``dp`` data-parallel ranks."""
    whole = dp == recipe.parallel.replicas
    offload = recipe.parallel.offload
    return FsdpPolicy(
        reduces_each=offload or (recipe.checkpoint_activations and not whole), keeps_weights=whole and not offload
    )
