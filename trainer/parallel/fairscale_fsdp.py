"""The engine that OPT ran on, on GPUs: fairscale's own FSDP, with its tensor-parallel layers.

Each layer is wrapped, and the model around it. A wrapper puts its parameters end to end into one flat parameter, of
which each data-parallel rank holds an equal part in fp32. Whole parameters are gathered for the forward pass and stay
until the backward pass (``--no-reshard-after-forward``, as OPT-175B was trained).

Read against fairscale 0.4.13 and torch 2.13. Its computation runs in the tests on CPUs, with CUDA's streams replaced by
nothing. The test that runs it on a GPU is tests/trainer/test_engine_fairscale_gpu.py.
"""

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard as Split
from torch.utils.checkpoint import checkpoint

from trainer import optim
from trainer.errors import UserError
from trainer.model.opt import OPT, DecoderLayer
from trainer.model.precision import DTYPES
from trainer.parallel import engine
from trainer.parallel.fairscale_layers import form_groups, loss_sum, placement, split_layer, split_outside
from trainer.parallel.flat_part import FlatPart
from trainer.parallel.mesh import Layout
from trainer.preconditions import check_engine
from trainer.recipes import Recipe

try:
    from fairscale.internal.parallel import ProcessGroupName
    from fairscale.nn.data_parallel import FullyShardedDataParallel
except ImportError as error:
    raise UserError(
        f"engine=fairscale needs the package fairscale, whose FSDP cannot be imported ({error}): install "
        "opt-ops[fairscale], or use engine=fsdp2."
    ) from error


# torch has other names now for what fairscale, of 2023, calls. These warnings would come with every layer.
_RENAMED = ("TypedStorage is deprecated", r"`torch\.distributed\._(all_gather|reduce_scatter)_base` is a private")


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter in a flat one.

    Attributes:
        name: of the parameter.
        shape: of it, or of its tensor-parallel part.
        flat: the part of the flat parameter that this rank holds.
        begin: number of the first element of this rank's range, in the order of ``shape``.
        where: the place of that range in ``flat``.
        parameter: that range. It shares the memory. The optimizer updates it.
    """

    name: str
    shape: torch.Size
    flat: nn.Parameter
    begin: int
    where: slice
    parameter: nn.Parameter


class FairscaleFsdpEngine(engine.Engine):
    """Wraps ``model``, which may be on the meta device, layer by layer: no rank needs room for all of it.

    In every precision, gradients are averaged over ranks in fp32 and applied to fp32 master weights.

    Raises:
        UserError: the recipe asks for something that this engine cannot do.
    """

    comparable = False  # each rank holds moments of its own part only, and nothing twice

    def __init__(self, model: OPT, recipe: Recipe, layout: Layout) -> None:
        check_engine(recipe, on_gpu=True)
        for message in _RENAMED:
            warnings.filterwarnings("ignore", message=message)
        self.model, self.layout = model, layout
        wrap = partial(FullyShardedDataParallel, **_options(recipe, layout, form_groups(layout)))
        for name, part in model.named_children():
            if name not in {"layers", "lm_head"}:
                model.draw(part, layout.device)
        for index, layer in enumerate(model.layers):
            model.draw(layer, layout.device)
            split_layer(layer, layout)
            if recipe.checkpoint_activations:
                # Only attention's dropout has a generator. The other masks are functions of the clock, the same again.
                random = bool(recipe.model.attention_dropout)
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=random)
            model.layers[index] = wrap(layer)
        split_outside(model, layout)
        self._wrapped = wrap(model)
        # Within no_sync, FSDP accumulates in the format of the computation: only in fp32 is that as good as its sums.
        self._reduce_each = recipe.precision != "fp32"
        self._names: dict[str, torch.Size] = {}
        self._places: list[_Place] = list(self._find_places())
        self.optimizer = optim.build([place.parameter for place in self._places], recipe.optim)
        self.shards = [
            engine.Shard(place.name, place.parameter, 1 if isinstance(placement(place.name), Split) else layout.tp)
            for place in self._places
        ]

    def _find_places(self) -> Iterator[_Place]:
        """Where this rank's range of each parameter is, by the metadata that FSDP offers for its checkpoints."""
        wrappers = [module for module in self._wrapped.modules() if isinstance(module, FullyShardedDataParallel)]
        found: list[dict[str, Any]] = self._wrapped.local_metadata_dict()["param_metadata"]
        for wrapper, metadata in zip(wrappers, found, strict=True):
            (flat,), (row,) = wrapper.params, metadata["params"].values()
            begin, end = flat.numel() * self.layout.dp_rank, flat.numel() * (self.layout.dp_rank + 1)
            at = 0
            for name, shape, numel in zip(row["names"], row["shapes"], row["numels"], strict=True):
                whole_name = f"{metadata['fsdp_path']}.{name}" if metadata["fsdp_path"] else name
                self._names[whole_name] = shape
                first, last = max(at, begin), min(at + numel, end)
                if first < last:
                    where = slice(first - begin, last - begin)
                    yield _Place(whole_name, shape, flat, first - at, where, nn.Parameter(flat.data[where]))
                at += numel

    def names(self) -> list[str]:
        """See the base class."""
        return list(self._names)

    def zero_grad(self) -> None:
        """Drop the gradients, of the flat parameters and of their ranges."""
        self._wrapped.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """See the base class. In half precision, every micro-batch is summed over ranks, in fp32, as metaseq did."""
        with contextlib.nullcontext() if last or self._reduce_each else self._wrapped.no_sync():
            yield
        self._remove_hooks()
        if last:
            for place in self._places:
                place.parameter.grad = None if place.flat.grad is None else place.flat.grad[place.where]

    def _remove_hooks(self) -> None:
        """Remove the hooks that FSDP added in this forward pass. It leaves them, and in fp32 adds more in the next."""
        for flat in self._wrapped.parameters():
            if held := vars(flat).pop("_shard_bwd_hook", None):
                _, handle = held
                handle.remove()

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class. All ranks of a tensor-parallel group hold all activations."""
        logits, activation_norm = self._wrapped(inputs, hide=False)
        return loss_sum(self.model, logits, targets, self.layout), activation_norm / self.layout.tp

    def first_position(self, seq_len: int) -> int:  # noqa: ARG002
        """See the base class: 0, because every rank holds the whole sequence."""
        return 0

    def local(self, tensor: Tensor) -> Tensor:
        """See the base class: ranges are plain tensors."""
        return tensor

    def gather(self, layer: DecoderLayer) -> None:
        """See the base class. FSDP has no public call for it that its forward pass knows of afterwards."""
        assert isinstance(layer, FullyShardedDataParallel)
        layer._lazy_init()  # noqa: SLF001
        layer._rebuild_full_params()  # noqa: SLF001  once they are there, the forward pass does not gather them again
        layer.module._unflatten_params_as_views()  # noqa: SLF001

    def state(self) -> dict[str, dict[str, Any]]:
        """See the base class. A parameter or moment is this rank's range of it, by its name in the model."""
        by_name = {place.name: place for place in self._places}
        model, moments = {}, {}
        for name, shape in self._names.items():
            if name in by_name:
                place = by_name[name]
                model[name] = self._part(place, place.parameter)
                moments[name] = {
                    key: value if key == "step" else self._part(place, value)
                    for key, value in self.optimizer.state[place.parameter].items()
                }
            else:
                model[name] = self._nothing(name, shape)
        return {"model": model, "optimizer": moments}

    def _part(self, place: _Place, values: Tensor) -> FlatPart:
        whole, offset = self._whole(place.name, place.shape)
        return FlatPart(values.detach(), place.begin, place.shape, whole, offset)

    def _nothing(self, name: str, shape: torch.Size) -> FlatPart:
        """A parameter of which this rank holds nothing. It is named nevertheless: all ranks know the whole model."""
        whole, offset = self._whole(name, shape)
        return FlatPart(torch.empty(0, device=self.layout.device), 0, shape, whole, offset)

    def _whole(self, name: str, shape: torch.Size) -> tuple[torch.Size, list[int]]:
        """The shape of the whole parameter, and where the tensor-parallel part of this rank begins in it."""
        sizes, offset, how = list(shape), [0] * len(shape), placement(name)
        if isinstance(how, Split):
            offset[how.dim] = sizes[how.dim] * self.layout.tp_rank
            sizes[how.dim] *= self.layout.tp
        return torch.Size(sizes), offset


def _options(recipe: Recipe, layout: Layout, group: dist.ProcessGroup) -> dict[str, Any]:
    half = recipe.precision != "fp32"
    return {
        "process_group": group,
        # With whole parameters kept there is no gathering in the backward pass, so one communicator is enough.
        "process_group_reduce_scatter": ProcessGroupName.default,
        "reshard_after_forward": False,
        "mixed_precision": half,
        "fp32_reduce_scatter": half,
        "compute_dtype": DTYPES[recipe.precision],
        "compute_device": layout.device,
    }
