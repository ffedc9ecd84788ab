"""How tensor-parallel ranks share the model, by Megatron's split with sequence parallelism (arXiv 2205.05198).

Between layers, each rank holds its part of every sequence (dim 1). Inside a layer it has whole sequences, and its part
of the heads and of the feed-forward layer. Where a layer computes with plain tensors (:mod:`trainer.model.sharded`),
the styles here only split its parameters, and tell it the group of ranks to exchange with.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
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
    columns = _Held(Shard(0))
    norm = _Held(Replicate(), knows_group=True)
    end = _Held(Shard(1), Replicate(), knows_group=True)
    plan: dict[str, ParallelStyle] = {
        "self_attn_layer_norm": norm,
        "self_attn": _Held(None, knows_group=True),
        "self_attn.q_proj": columns,
        "self_attn.k_proj": columns,
        "self_attn.v_proj": columns,
        "self_attn.out_proj": end,
        "final_layer_norm": norm,
        "fc1": _Held(Shard(0), knows_group=True),
        "fc2": end,
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
        plan["final_layer_norm"] = _Held(Replicate(), knows_group=True)
    if config.embedding_width != config.hidden_size:
        plan |= {name: SequenceParallel(use_local_output=True) for name in ("project_in", "project_out")}
    return plan


class _Held(ParallelStyle):
    """Ranks hold the parameters of a module by a placement. Its code computes with what this rank holds.

    Args:
        weight: how ranks hold the weight. None if the module has no parameters of its own.
        bias: how they hold the bias, if not as the weight.
        knows_group: whether the module itself exchanges with the other ranks.
    """

    def __init__(self, weight: Placement | None, bias: Placement | None = None, *, knows_group: bool = False) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias or weight
        self._knows_group = knows_group

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module.named_parameters(recurse=False):
            placement = self._bias if name == "bias" else self._weight
            assert placement is not None
            split = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(split))
        if self._knows_group:
            setattr(module, "group", device_mesh.get_group())  # noqa: B010  a module of ours, and no Tensor or Module
        return module
