"""Which engine a recipe asks for."""

import torch

from trainer.model.opt import OPT
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe


def build(recipe: Recipe, layout: Layout) -> Engine:
    """A new model, spread with the recipe's engine.

    Raises:
        UserError: the recipe asks for what this engine does not do here, or it is not installed.
    """
    if recipe.engine == "fairscale":
        from trainer.parallel.fairscale import FairscaleEngine  # an extra, and only where it is asked for

        return FairscaleEngine(OPT(recipe.model, recipe.seed), recipe, layout)
    from trainer.parallel.fsdp2 import Fsdp2Engine

    with torch.device("meta"):  # weights are drawn as they are spread: no rank has room for all of them
        model = OPT(recipe.model, recipe.seed)
    return Fsdp2Engine(model, recipe, layout)
