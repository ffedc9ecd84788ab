"""PyTorch's own engine: FSDP2 over data-parallel ranks, tensor and sequence parallelism within each layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from trainer import optim
from trainer.model.opt import OPT, DecoderLayer
from trainer.model.precision import DTYPES
from trainer.model.sharded import gathered
from trainer.parallel import engine, policy, tensor_parallel
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe

# FSDP2 warns of layers whose output is a view, because something could change it in place. Nothing here does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


class Fsdp2Engine(engine.Engine):
    """Spreads ``model`` in place. Then each rank holds its shards of the parameters, as DTensors.

    FSDP is applied for any number of ranks, also for one. So there is one code path, and one place that sets the
    precision. In every precision, gradients are summed over ranks in fp32 and applied to fp32 master weights.
    :mod:`trainer.parallel.policy` says when they are summed, and when gathered weights are kept.
    """

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        self.model = model
        self.layout = layout
        fused = {op for op, how in model.ops.ran.items() if how == "fused"}
        self._policy = policy.choose(recipe, layout.dp, layout.gpu_memory, fused)
        device = torch.device("cpu") if recipe.parallel.offload else layout.device
        shard = partial(fully_shard, mesh=layout.data_mesh, **_policies(recipe, layout))
        # Layer by layer: a device never holds more than its shards and one whole layer.
        for layer in model.layers:
            model.draw(layer, device)
            if layout.tp > 1:
                assert isinstance(layer, DecoderLayer)
                tensor_parallel.split_layer(layer, layout.mesh["tp"])
            if recipe.checkpoint_activations:
                # Only attention's dropout has a generator. The other masks are functions of the clock, the same again.
                random = bool(recipe.model.attention_dropout)
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=random)
            if recipe.compiles(on_gpu=layout.device.type == "cuda"):
                layer.compile()
            shard(layer)
        for name, part in model.named_children():
            if name not in {"layers", "lm_head"}:
                model.draw(part, device)
        if layout.tp > 1:
            tensor_parallel.split_outside(model, layout.mesh["tp"])
        shard(model)
        assert isinstance(model, FSDPModule)
        if self._policy.keeps_weights:
            model.set_reshard_after_forward(False)
        self.optimizer = optim.build(model.parameters(), recipe.optim)
        self.shards = [engine.Shard(name, p, _copies(p)) for name, p in model.named_parameters()]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See the base class."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last or self._policy.reduces_each)
        # After the last micro-batch a rank holds its shards only: update, evaluation and save rely on it.
        self.model.set_reshard_after_backward(last or not self._policy.keeps_weights)
        yield

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class. The activations of a rank are its part of each sequence, and of the vocabulary."""
        logits, activation_norm = self.model(inputs, hide=False)
        group, tp_rank = None, self.layout.tp_rank
        if isinstance(logits, DTensor):
            logits, group = logits.to_local(), logits.device_mesh.get_group()
        rows, vocab_size = logits.flatten(0, 1), self.model.config.vocab_size
        losses = self.model.ops.cross_entropy(rows, targets.flatten(), vocab_size, tp_rank * rows.shape[1], group)
        return losses.sum(), activation_norm

    def first_position(self, seq_len: int) -> int:
        """See the base class. With sequence parallelism each tensor-parallel rank holds its part of the sequence."""
        return self.layout.tp_rank * (seq_len // self.layout.tp)

    def gather(self, layer: DecoderLayer) -> None:
        """See the base class."""
        assert isinstance(layer, FSDPModule)
        layer.unshard()

    def whole_sequence(self, x: Tensor) -> Tensor:
        """See the base class. All tensor-parallel ranks of a group must call it."""
        if self.layout.tp == 1:
            return x
        return gathered(x, self.layout.mesh["tp"].get_group())

    def local(self, tensor: Tensor) -> Tensor:
        """See the base class: the shard of the DTensor."""
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def state(self) -> dict[str, dict[str, Any]]:
        """See the base class. A tied parameter appears once, under its first name."""
        named = list(self.model.named_parameters())
        return {
            # Detached, so that a save does not copy the gradients, too.
            "model": {name: p.detach() for name, p in named},
            "optimizer": {name: self.optimizer.state[p] for name, p in named},
        }


def _copies(parameter: Tensor) -> int:
    """The number of ranks that hold the same shard: the product of the mesh dimensions that replicate it."""
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
