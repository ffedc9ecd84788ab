"""The engine that OPT ran on: fairscale's tensor-parallel layers, with its FSDP on GPUs, OSS and ShardedDDP on CPUs.

fairscale's FSDP cannot run without CUDA. OSS and ShardedDDP spread the optimizer and the gradients over data-parallel
ranks, and keep the parameters whole on each (ZeRO's second stage, as OPT used it: ``--no-reshard-after-forward``).
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from trainer import optim
from trainer.errors import UserError
from trainer.model.opt import OPT
from trainer.parallel import engine
from trainer.parallel.mesh import Layout
from trainer.recipes import Recipe

try:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.nn.model_parallel import initialize, layers
    from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
    from fairscale.optim.oss import OSS
except ImportError as error:
    raise UserError(
        f"engine=fairscale needs the package fairscale, which is not there ({error}): install opt-ops[fairscale], or "
        "leave the engine at fsdp2."
    ) from error

# Which dimension of a parameter tensor-parallel ranks share; those not here they hold alike.
_COLUMN = ("q_proj", "k_proj", "v_proj", "fc1")
_ROW = ("out_proj", "fc2")


class FairscaleEngine(engine.Engine):
    """``model`` is changed in place: its linear layers and token embeddings become fairscale's.

    There is no sequence parallelism: tensor-parallel ranks hold the whole sequence between layers.

    Raises:
        UserError: the recipe asks for what this engine does not do.
    """

    comparable = False  # each rank has counters and moments of parameters that no other has

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        _check(recipe, layout)
        self.model = model
        self.layout = layout
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes of its groups
            initialize.destroy_model_parallel()  # of another engine in this process, as in tests
            initialize.initialize_model_parallel(layout.tp)
        _split(model, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fairscale is of 2023, and names of torch have changed
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
        """Forget the gradients."""
        (self._data_parallel or self.model).zero_grad(set_to_none=True)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See :meth:`trainer.engine.Engine.micro_step`. The sum goes to the rank that will update the parameter."""
        with self._data_parallel.no_sync() if self._data_parallel and not last else contextlib.nullcontext():
            yield

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`trainer.engine.Engine.loss`. All ranks of a tensor-parallel group have all activations."""
        logits, activation_norm = (self._data_parallel or self.model)(inputs)
        if isinstance(logits, DTensor):
            logits = logits.to_local()
        losses = vocab_parallel_cross_entropy(logits.float(), targets)
        return losses.sum(), activation_norm / self.layout.tp

    def first_position(self, seq_len: int) -> int:  # noqa: ARG002
        """Every rank has the whole sequence."""
        return 0

    def local(self, tensor: Tensor) -> Tensor:
        """It is plain already."""
        return tensor

    def state(self) -> dict[str, dict[str, Any]]:
        """Parameters and moments as DTensors. Of the data-parallel ranks, a parameter's owner alone has its moments."""
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

    def update(self, gnorm: float, lr: float, loss_scale: float | None = None, *, apply: bool = True) -> None:
        """See :meth:`trainer.engine.Engine.update`; then the owners send their parameters to the other ranks."""
        optim.set_learning_rate(self._sharded, lr)  # which hands it to the optimizer inside
        optim.set_learning_rate(self.optimizer, lr)
        if apply:
            optim.update(self._sharded, self.gradients(), gnorm, loss_scale)


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Split | Replicate]) -> DTensor:
    """``tensor`` as this rank's part, sharing its memory."""
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)


def _data_parallel(model: OPT, optimizer: OSS) -> ShardedDataParallel:
    """Gradients go to the rank that updates the parameter, in buckets that hold all of them.

    Not without buckets: there, fairscale 0.4.13 takes the rank within the group for that in the world and drops
    gradients that it ought to keep; and a group of one never has any.
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
    wrapped.refresh_trainable()  # else the first forward pass would do it, and move the parameters to new memory
    return wrapped


def _check(recipe: Recipe, layout: Layout) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"engine=fairscale does not do {what}: use engine=fsdp2 for it.")

    if layout.device.type == "cuda":
        refuse("GPUs yet")
    if recipe.precision != "fp32":
        refuse(f"precision={recipe.precision} on CPU, where its FSDP cannot run")
    for name, value in (
        ("parallel.replicas above 1", recipe.parallel.replicas > 1),
        ("parallel.offload", recipe.parallel.offload),
        ("compile", recipe.compile),
    ):
        if value:
            refuse(name)


def _split(model: OPT, layout: Layout) -> None:
    """Put fairscale's layers in the place of linear ones and of token embeddings, with their part of the weights."""
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

    def as_shard(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # The model asks a DTensor which part of the vocabulary it holds.
        return DTensor.from_local(output, layout.mesh["tp"], [Split(-1)], run_check=False)

    if layout.tp > 1:
        model.lm_head.register_forward_hook(as_shard)


def _linear(old: nn.Linear, name: str) -> nn.Module:
    if name in _ROW:
        return layers.RowParallelLinear(old.in_features, old.out_features, input_is_parallel=True)
    bias = old.bias is not None
    return layers.ColumnParallelLinear(old.in_features, old.out_features, bias=bias, gather_output=False)


@torch.no_grad()
def _take_over(old: nn.Module, new: nn.Module, name: str, layout: Layout) -> None:
    for kind, parameter in old.named_parameters():
        placement = _placement(f"{name}.{kind}")
        part = parameter.chunk(layout.tp, placement.dim)[layout.tp_rank] if isinstance(placement, Split) else parameter
        new.get_parameter(kind).copy_(part)


def _placement(name: str) -> Split | Replicate:
    """How tensor-parallel ranks share the parameter ``name``."""
    *_, module, kind = name.split(".")
    if module in _COLUMN or module in ("embed_tokens", "lm_head"):
        return Split(0)
    if module in _ROW and kind == "weight":
        return Split(1)
    return Replicate()
