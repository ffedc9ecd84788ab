"""PyTorch's own engine: tensor parallelism with sequence parallelism inside, FSDP2 outside."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from trainer import optim
from trainer.model.opt import OPT
from trainer.parallel import engine
from trainer.parallel.mesh import Layout
from trainer.recipes import ModelConfig, Recipe
from trainer.step.loss_scale import DTYPES


class Fsdp2Engine(engine.Engine):
    """``model`` is spread in place: after this each rank holds its shards of the parameters, as DTensors.

    FSDP is applied whatever the number of ranks, so that there is one code path, and one place that sets precision.
    Gradients are summed over ranks in fp32 and applied to fp32 master weights, in every precision: once for an update,
    or after each micro-batch where recomputation or offload say that memory is short.
    """

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        self.model = model
        self.layout = layout
        # Up to the last micro-batch FSDP2 would keep the gradients of all layers whole, in fp32.
        self._reduce_each = recipe.checkpoint_activations or recipe.parallel.offload
        device = torch.device("cpu") if recipe.parallel.offload else layout.device
        shard = partial(fully_shard, mesh=layout.data_mesh, **_policies(recipe, layout))
        # One after the other: no device need hold more than its shards and one whole layer.
        for layer in model.layers:
            model.draw(layer, device)
            if layout.tp > 1:
                parallelize_module(layer, layout.mesh["tp"], _layer_plan(), src_data_rank=None)
            if recipe.checkpoint_activations:
                # Dropout needs no generator's state: its masks are functions of the clock, which stands still.
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            if recipe.compile:
                layer.compile()
            shard(layer)
        for name, part in model.named_children():
            if name not in {"layers", "lm_head"}:
                model.draw(part, device)
        if layout.tp > 1:
            parallelize_module(model, layout.mesh["tp"], _outer_plan(model.config), src_data_rank=None)
            # parallelize_module replaces parameters one by one and so unties what was one tensor under two names.
            model.lm_head.weight = model.embed_tokens.weight
        shard(model)
        self.optimizer = optim.build(model.parameters(), recipe.optim)
        self.shards = [engine.Shard(name, p, _copies(p)) for name, p in model.named_parameters()]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """With tensor parallelism the logits stay sharded over the vocabulary, in loss and backward pass alike."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self._reduce_each)
        with loss_parallel() if self.layout.tp > 1 else nullcontext():
            yield

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`trainer.engine.Engine.loss`. A rank's share of activations is its part of each sequence."""
        logits, activation_norm = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"), activation_norm

    def first_position(self, seq_len: int) -> int:
        """Sequence parallelism gives each tensor-parallel rank its part."""
        return self.layout.tp_rank * (seq_len // self.layout.tp)

    def local(self, tensor: Tensor) -> Tensor:
        """The DTensor's shard."""
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def state(self) -> dict[str, dict[str, Any]]:
        """The DTensors themselves. A tied parameter comes once, under its first name."""
        named = list(self.model.named_parameters())
        return {
            # Detached: else the stager would copy the gradients, too.
            "model": {name: p.detach() for name, p in named},
            "optimizer": {name: self.optimizer.state[p] for name, p in named},
        }


def _copies(parameter: Tensor) -> int:
    """How many ranks hold the same shard: those along the dimensions of the mesh in which it is replicated."""
    assert isinstance(parameter, DTensor)
    copies = 1
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            copies *= parameter.device_mesh.size(dimension)
    return copies


def _policies(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    precision, offload = MixedPrecisionPolicy(), OffloadPolicy()
    if recipe.precision != "fp32":
        precision = MixedPrecisionPolicy(param_dtype=DTYPES[recipe.precision], reduce_dtype=torch.float32)
    if recipe.parallel.offload:
        offload = CPUOffloadPolicy(pin_memory=layout.device.type == "cuda")
    return {"mp_policy": precision, "offload_policy": offload}


# Megatron's split with sequence parallelism: between layers, each rank has its part of every sequence (dim 1).


def _outer_plan(config: ModelConfig) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "embed_positions": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    if config.norm == "pre":
        plan["final_layer_norm"] = SequenceParallel(use_local_output=True)
    if config.embedding_width != config.hidden_size:
        plan |= {name: SequenceParallel(use_local_output=True) for name in ("project_in", "project_out")}
    return plan


def _layer_plan() -> dict[str, ParallelStyle]:
    return {
        "self_attn_layer_norm": SequenceParallel(use_local_output=True),
        "self_attn": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.out_proj": RowwiseParallel(output_layouts=Shard(1)),
        "final_layer_norm": SequenceParallel(use_local_output=True),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
