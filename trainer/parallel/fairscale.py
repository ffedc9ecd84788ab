"""The engine that OPT ran on, fairscale: tensor-parallel layers with OSS and ShardedDDP, on CPUs.

OSS and ShardedDDP spread optimizer and gradients over data-parallel ranks. Each rank keeps the whole parameters (ZeRO
stage 2, as OPT used it: ``--no-reshard-after-forward``). fairscale's FSDP needs CUDA: on GPUs the engine is
:mod:`trainer.parallel.fairscale_fsdp`.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Split

from trainer import optim
from trainer.errors import UserError
from trainer.model.opt import OPT
from trainer.parallel import engine
from trainer.parallel.fairscale_layers import form_groups, loss_sum, placement, split_layer, split_outside
from trainer.parallel.mesh import Layout
from trainer.preconditions import check_engine
from trainer.recipes import Recipe

try:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS
except ImportError as error:
    raise UserError(
        f"engine=fairscale needs the package fairscale, which cannot be imported ({error}): install "
        "opt-ops[fairscale], or use engine=fsdp2."
    ) from error


class FairscaleEngine(engine.Engine):
    """Changes ``model`` in place: its linear layers and token embeddings become those of fairscale.

    There is no sequence parallelism: between layers, tensor-parallel ranks hold the whole sequence.

    Raises:
        UserError: the recipe asks for something that this engine cannot do.
    """

    comparable = False  # each rank holds counters and moments of its own parameters only

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        check_engine(recipe, on_gpu=False)
        self.model = model
        self.layout = layout
        group = form_groups(layout)
        for layer in model.layers:
            split_layer(layer, layout)
        split_outside(model, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fairscale is from 2023; names in torch have changed since
            self._sharded = OSS(
                model.parameters(),
                optim=torch.optim.AdamW,
                group=group,
                **optim.settings(recipe.optim),
            )
            self._data_parallel = _data_parallel(model, self._sharded, group) if layout.dp > 1 else None
        self.optimizer = self._sharded.optim
        for optimizer in (self._sharded, self.optimizer):
            optimizer.param_groups[0]["clip_norm"] = recipe.optim.clip_norm
        optim.allocate(self.optimizer)
        mine = set(self.optimizer.param_groups[0]["params"])
        named = list(model.named_parameters())
        self._placements = {name: placement(name) for name, _ in named}
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
        return loss_sum(self.model, logits, targets, self.layout), activation_norm / self.layout.tp

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

    def update(self, gnorm: float | Tensor, lr: float, divisor: float, *, unless: Tensor | None = None) -> None:
        """See the base class. After an update, the owners send their parameters to the other ranks."""
        optim.set_learning_rate(self._sharded, lr)  # OSS copies it to its inner optimizer at the next step
        optim.set_learning_rate(self.optimizer, lr)
        factor = optim.gradient_factor(self.optimizer, gnorm, divisor)
        optim.update(self.optimizer, factor, unless=unless, step=self._sharded.step)


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Split | Replicate]) -> DTensor:
    """A DTensor with ``tensor`` as the part of this rank. It shares the memory."""
    return DTensor.from_local(tensor.detach(), mesh, placements, run_check=False)


def _data_parallel(model: OPT, optimizer: OSS, group: dist.ProcessGroup) -> ShardedDataParallel:
    """Wrap ``model`` so that gradients go to the rank that updates the parameter, in one bucket for all of them.

    The bucket is needed. Without buckets, fairscale 0.4.13 confuses the rank in the group with the rank in the world,
    and drops gradients that it must keep.
    """
    wrapped = ShardedDataParallel(
        model,
        optimizer,
        process_group=group,
        broadcast_buffers=False,
        sync_models_at_startup=False,  # all ranks draw the same weights
        reduce_buffer_size=sum(p.numel() for p in model.parameters()),
        auto_refresh_trainable=False,
    )
    wrapped.refresh_trainable()  # otherwise the first forward pass does it, and moves the parameters to new memory
    return wrapped
