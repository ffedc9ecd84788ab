"""Build the engine that a recipe asks for."""

import torch

from trainer.model.opt import OPT
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe


def build(recipe: Recipe, layout: Layout) -> Engine:
    """A new model, spread over the mesh by the recipe's engine.

    Raises:
        UserError: the engine cannot do what the recipe asks for, or its package is not installed.
    """
    if recipe.engine == "fairscale":
        from trainer.parallel.fairscale import FairscaleEngine  # an extra, so it is imported only if asked for

        return FairscaleEngine(OPT(recipe.model, recipe.seed), recipe, layout)
    from trainer.parallel.fsdp2 import Fsdp2Engine

    with torch.device("meta"):  # weights are drawn while they are sharded: no rank has room for all of them
        model = OPT(recipe.model, recipe.seed)
    return Fsdp2Engine(model, recipe, layout)
