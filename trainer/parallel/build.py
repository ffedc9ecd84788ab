"""Build the engine that a recipe asks for."""

from dataclasses import replace

import torch

from trainer.errors import UserError
from trainer.kernels import adamw, jit
from trainer.kernels.choice import Ops, choose
from trainer.model.opt import OPT
from trainer.model.precision import DTYPES
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe


def build(recipe: Recipe, layout: Layout) -> Engine:
    """A new model, spread over the mesh by the recipe's engine.

    Raises:
        UserError: the engine cannot do what the recipe asks for, or its package is not installed. Or the kernels that
            the recipe asks for cannot run here.
    """
    on_cpu = layout.device.type == "cpu"
    # On the meta device weights are drawn while they are sharded: no rank has room for all of them.
    with torch.device("cpu" if recipe.engine == "fairscale" and on_cpu else "meta"):
        model = OPT(recipe.model, recipe.seed)
    model.use(_ops(recipe, layout.device))
    if recipe.engine == "fairscale":  # an extra, so it is imported only if asked for
        if on_cpu:
            from trainer.parallel.fairscale import FairscaleEngine

            return FairscaleEngine(model, recipe, layout)
        from trainer.parallel.fairscale_fsdp import FairscaleFsdpEngine

        return FairscaleFsdpEngine(model, recipe, layout)
    from trainer.parallel.fsdp2 import Fsdp2Engine

    return Fsdp2Engine(model, recipe, layout)


def _ops(recipe: Recipe, device: torch.device) -> Ops:
    if recipe.kernels == "on" and (reason := jit.cannot_run(torch.empty(0, device=device)) or adamw.cannot_run(device)):
        raise UserError(f"kernels=on cannot work here: {reason}. Use kernels=auto.")
    architecture = None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    ops = choose(recipe.kernels, architecture, DTYPES[recipe.precision])
    if ops.ran["adamw"] == "fused" and (reason := _not_adamw(recipe, device)):
        ops = replace(ops, adamw=adamw.reference, ran={**ops.ran, "adamw": f"reference: {reason}"})
    return ops


def _not_adamw(recipe: Recipe, device: torch.device) -> str | None:
    """Why the update is torch's AdamW although the kernel was chosen, or None."""
    if recipe.engine == "fairscale":
        return "with fairscale the update is torch's AdamW"
    if recipe.parallel.offload and device.type != "cpu":
        return "offloaded parameters are updated on the CPU"
    return adamw.cannot_run(device)
