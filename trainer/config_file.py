"""What ``config.json`` says of an attempt: what is trained, how, and on which ranks."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from trainer import device
from trainer.data.dataset import Dataset
from trainer.job import TrainJob
from trainer.model.precision import DTYPES
from trainer.optim_config import stated
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe
from trainer.step.measured import Progress


def config_of(
    job: TrainJob, engine: Engine, data: Dataset, progress: Progress, firsts: Sequence[int]
) -> dict[str, Any]:
    """The content of the file, without what :func:`trainer.telemetry.write_config` adds.

    ``firsts`` are the first samples of the changes of the data.
    """
    recipe = job.recipe
    config = recipe.optim
    return {
        "attempt": job.attempt,
        "recipe": job.recipe_name,
        "steps": recipe.steps,
        "settings": asdict(recipe),
        "schedule": stated(recipe.optim),
        "lr_factors": job.lr_factors,
        "skips": job.skips,
        "optimizer": {
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "clip_norm": config.clip_norm,
        },
        "layout": layout_of(engine.layout),
        "kernels": dict(engine.model.ops.ran),
        "device": _device(recipe, engine.layout),
        "model": {"parameters": engine.size(), **asdict(recipe.model)},
        "data": data.about(progress.step, firsts),
        "resume": {"path": str(job.resume), "step": progress.step} if job.resume else None,
        "init_from": str(job.init_from) if job.init_from else None,
    }


def _device(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    """What computes on rank 0, and which attention kernel it runs."""
    model = recipe.model
    heads, width = model.num_heads // layout.tp, model.hidden_size // model.num_heads
    query = torch.empty(1, recipe.data.seq_len, heads, width, dtype=DTYPES[recipe.precision], device=layout.device)
    return device.about(query.requires_grad_().transpose(1, 2), model.attention_dropout)


def layout_of(layout: Layout) -> dict[str, int]:
    """The numbers of ranks, as configuration and manifests have them."""
    return {"world": layout.world, "dp": layout.dp, "tp": layout.tp}
