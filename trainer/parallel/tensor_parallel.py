"""How tensor-parallel ranks share the model, by Megatron's split with sequence parallelism (arXiv 2205.05198).

Between layers, each rank holds its part of every sequence (dim 1). Inside a layer it has whole sequences, and its part
of the heads and of the feed-forward layer. Where a layer computes with plain tensors (:mod:`trainer.model.sharded`),
the styles here only split its parameters and gather its input.
"""

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.model.opt import OPT, DecoderLayer
from trainer.recipes import ModelConfig


def split_layer(layer: DecoderLayer, mesh: DeviceMesh) -> None:
    """Split the parameters of ``layer`` over ``mesh``."""
    columns, whole = _Held(Shard(0)), _Held(Replicate())
    plan: dict[str, ParallelStyle] = {
        "self_attn_layer_norm": whole,
        "self_attn": _Held(None, gathers=True),
        "self_attn.q_proj": columns,
        "self_attn.k_proj": columns,
        "self_attn.v_proj": columns,
        "self_attn.out_proj": RowwiseParallel(output_layouts=Shard(1)),
        "final_layer_norm": whole,
        "fc1": _Held(Shard(0), gathers=True),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def split_outside(model: OPT, mesh: DeviceMesh) -> None:
    """Split the parameters of ``model`` that are not in layers."""
    parallelize_module(model, mesh, _outer_plan(model.config), src_data_rank=None)
    # parallelize_module replaces parameters one by one, so the tied matrix becomes two. Tie it again.
    model.lm_head.weight = model.embed_tokens.weight


def _outer_plan(config: ModelConfig) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "embed_positions": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    if config.norm == "pre":
        plan["final_layer_norm"] = _Held(Replicate())
    if config.embedding_width != config.hidden_size:
        plan |= {name: SequenceParallel(use_local_output=True) for name in ("project_in", "project_out")}
    return plan


class _Held(ParallelStyle):
    """Ranks hold the parameters of a module by ``placement``. Its code computes with what this rank holds.

    Args:
        placement: of all parameters of the module itself. None if it has none.
        gathers: whether its input is gathered to whole sequences first.
    """

    def __init__(self, placement: Placement | None, *, gathers: bool = False) -> None:
        super().__init__()
        self._placement = placement
        self._gathers = gathers

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module.named_parameters(recurse=False):
            assert self._placement is not None
            split = distribute_tensor(parameter, device_mesh, [self._placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(split))
        if self._gathers:
            module.register_forward_pre_hook(partial(_gather_input, device_mesh))
        return module


def _gather_input(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    (part,) = inputs
    whole = DTensor.from_local(part, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
    # Each rank finds its part of a sum, the gradient of the whole. The way back adds the parts up and splits the sum.
    return (whole.to_local(grad_placements=[Partial()]),)
