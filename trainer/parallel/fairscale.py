"""The engine that OPT ran on, fairscale: tensor-parallel layers with OSS and ShardedDDP, on CPUs.

OSS and ShardedDDP spread optimizer and gradients over data-parallel ranks. Each rank keeps the whole parameters (ZeRO
stage 2, as OPT used it: ``--no-reshard-after-forward``). fairscale's FSDP needs CUDA; this engine does not use it yet.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from trainer import optim
from trainer.errors import UserError
from trainer.model.fused import LinearReLU
from trainer.model.opt import OPT, DecoderLayer
from trainer.parallel import engine
from trainer.parallel.mesh import Layout
from trainer.preconditions import check_engine
from trainer.recipes import Recipe

try:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.nn.model_parallel import initialize, layers, mappings
    from fairscale.optim.oss import OSS
except ImportError as error:
    raise UserError(
        f"engine=fairscale needs the package fairscale, which cannot be imported ({error}): install "
        "opt-ops[fairscale], or use engine=fsdp2."
    ) from error

# Layers that tensor-parallel ranks share, by column or by row. All ranks hold the other layers whole.
_COLUMN = ("q_proj", "k_proj", "v_proj", "fc1")
_ROW = ("out_proj", "fc2")


class FairscaleEngine(engine.Engine):
    """Changes ``model`` in place: its linear layers and token embeddings become those of fairscale.

    There is no sequence parallelism: between layers, tensor-parallel ranks hold the whole sequence.

    Raises:
        UserError: the recipe asks for something that this engine cannot do.
    """

    comparable = False  # each rank holds counters and moments of its own parameters only

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        _check(recipe, layout)
        self.model = model
        self.layout = layout
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints the sizes of its groups
            initialize.destroy_model_parallel()  # left by another engine in this process, as in tests
            initialize.initialize_model_parallel(layout.tp)
        _split(model, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fairscale is from 2023; names in torch have changed since
            self._sharded = OSS(
                model.parameters(),
                optim=torch.optim.AdamW,
                group=initialize.get_data_parallel_group(),
                **optim.settings(recipe.optim),
            )
            self._data_parallel = _data_parallel(model, self._sharded) if layout.dp > 1 else None
        self.optimizer = self._sharded.optim
        for optimizer in (self._sharded, self.optimizer):
            optimizer.param_groups[0]["clip_norm"] = recipe.optim.clip_norm
        optim.allocate(self.optimizer)
        mine = set(self.optimizer.param_groups[0]["params"])
        named = list(model.named_parameters())
        self._placements = {name: _placement(name) for name, _ in named}
        self.shards = [
            engine.Shard(name, p, 1 if isinstance(self._placements[name], Split) else layout.tp)
            for name, p in named
            if p in mine
        ]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        (self._data_parallel or self.model).zero_grad(set_to_none=True)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See the base class. The sum goes to the rank that updates the parameter."""
        with self._data_parallel.no_sync() if self._data_parallel and not last else contextlib.nullcontext():
            yield

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class. All ranks of a tensor-parallel group hold all activations."""
        logits, activation_norm = (self._data_parallel or self.model)(inputs, hide=False)
        rows, vocab_size = logits.flatten(0, 1), self.model.config.vocab_size
        group = initialize.get_model_parallel_group() if self.layout.tp > 1 else None
        first = self.layout.tp_rank * rows.shape[1]
        losses = self.model.ops.cross_entropy(rows, targets.flatten(), vocab_size, first, group)
        return losses.sum(), activation_norm / self.layout.tp

    def first_position(self, seq_len: int) -> int:  # noqa: ARG002
        """See the base class: 0, because every rank holds the whole sequence."""
        return 0

    def local(self, tensor: Tensor) -> Tensor:
        """See the base class: parameters are plain tensors already."""
        return tensor

    def state(self) -> dict[str, dict[str, Any]]:
        """See the base class. Of the data-parallel ranks, only the owner of a parameter has its moments."""
        mesh, column = self.layout.mesh, self.layout.mesh["tp"]
        model, moments = {}, {}
        for name, parameter in self.model.named_parameters():
            split = self._placements[name]
            model[name] = _as_dtensor(parameter, mesh, [Replicate(), split])
            if state := self.optimizer.state.get(parameter):
                moments[name] = {
                    key: value if key == "step" else _as_dtensor(value, column, [split]) for key, value in state.items()
                }
        return {"model": model, "optimizer": moments}

    def update(self, gnorm: float, lr: float, divisor: float) -> None:
        """See the base class. After an update, the owners send their parameters to the other ranks."""
        optim.set_learning_rate(self._sharded, lr)  # OSS copies it to its inner optimizer at the next step
        optim.set_learning_rate(self.optimizer, lr)
        factor = optim.gradient_factor(self.optimizer, gnorm, divisor)
        optim.update(self.optimizer, factor, step=self._sharded.step)


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Split | Replicate]) -> DTensor:
    """A DTensor with ``tensor`` as the part of this rank. It shares the memory."""
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)


def _data_parallel(model: OPT, optimizer: OSS) -> ShardedDataParallel:
    """Wrap ``model`` so that gradients go to the rank that updates the parameter, in one bucket for all of them.

    The bucket is needed. Without buckets, fairscale 0.4.13 confuses the rank in the group with the rank in the world,
    and drops gradients that it must keep.
    """
    wrapped = ShardedDataParallel(
        model,
        optimizer,
        process_group=initialize.get_data_parallel_group(),
        broadcast_buffers=False,
        sync_models_at_startup=False,  # all ranks draw the same weights
        reduce_buffer_size=sum(p.numel() for p in model.parameters()),
        auto_refresh_trainable=False,
    )
    wrapped.refresh_trainable()  # otherwise the first forward pass does it, and moves the parameters to new memory
    return wrapped


def _check(recipe: Recipe, layout: Layout) -> None:
    if layout.device.type == "cuda":
        raise UserError("engine=fairscale does not support GPUs yet: use engine=fsdp2.")
    check_engine(recipe)


def _split(model: OPT, layout: Layout) -> None:
    """Replace linear layers and token embeddings by those of fairscale, with this rank's part of the weights."""
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if name == "embed_tokens":
                assert isinstance(child, nn.Embedding)
                new = layers.VocabParallelEmbedding(child.num_embeddings, child.embedding_dim)
            elif name in (*_COLUMN, *_ROW, "lm_head"):
                assert isinstance(child, nn.Linear)
                new = _linear(child, name)
            else:
                continue
            _take_over(child, new, name, layout)
            setattr(parent, name, new)
    model.lm_head.weight = model.embed_tokens.weight

    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.register_forward_pre_hook(_sum_gradients)


def _sum_gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The input as it is. What the ranks of a tensor-parallel group find for its gradient is summed."""
    return mappings.copy_to_model_parallel_region(inputs[0])


class _ColumnReLU(layers.ColumnParallelLinear):
    """:class:`trainer.model.fused.LinearReLU` with a part of the outputs."""

    op: Callable[..., Any]

    def forward(self, input_: Tensor) -> Tensor:
        """[..., inputs] → [..., part of the outputs]."""
        return self.op(mappings.copy_to_model_parallel_region(input_), self.weight, self.bias)


def _linear(old: nn.Linear, name: str) -> nn.Module:
    if name in _ROW:
        return layers.RowParallelLinear(old.in_features, old.out_features, input_is_parallel=True)
    if isinstance(old, LinearReLU):
        new = _ColumnReLU(old.in_features, old.out_features, gather_output=False)
        new.op = old.op
        return new
    bias = old.bias is not None
    return layers.ColumnParallelLinear(old.in_features, old.out_features, bias=bias, gather_output=False)


@torch.no_grad()
def _take_over(old: nn.Module, new: nn.Module, name: str, layout: Layout) -> None:
    for kind, parameter in old.named_parameters():
        placement = _placement(f"{name}.{kind}")
        part = parameter.chunk(layout.tp, placement.dim)[layout.tp_rank] if isinstance(placement, Split) else parameter
        new.get_parameter(kind).copy_(part)


def _placement(name: str) -> Split | Replicate:
    """How tensor-parallel ranks hold the parameter ``name``: split along a dimension, or whole."""
    *_, module, kind = name.split(".")
    if module in _COLUMN or module in ("embed_tokens", "lm_head"):
        return Split(0)
    if module in _ROW and kind == "weight":
        return Split(1)
    return Replicate()
