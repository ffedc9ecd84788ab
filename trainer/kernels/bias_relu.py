"""The first product of a feed-forward layer with its bias and ReLU.

Forward, the product adds the bias and applies ReLU before it writes (the epilogue of cuBLASLt on a GPU). It keeps the
output alone: where that is above zero is all that the gradient of ReLU needs. Backward, one kernel multiplies by the
gradient of ReLU and sums the gradient of the bias in the same pass: it reads two tensors of the size of the output
and writes one. The two products that follow are PyTorch's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.jit import TYPES, Compilation, cannot_run, constexpr, jit, tl, triton

# A program reads tiles of 8 rows by 512 columns: with 128 threads, 4 loads of 16 bytes in bf16 from each tensor.
_TILE_ROWS = 8
_TILE_COLUMNS = 512
_TILE = {"tile_rows": _TILE_ROWS, "tile_columns": _TILE_COLUMNS}
_WARPS = 4
# Each program sums a number of rows that depends on the shape alone, so two runs give the same bits. The sums of all
# programs are at most 128 rows of fp32: 4 % of the traffic at 4,096 tokens, 1 % at 16,384.
_LEAST_ROWS = 32
_MOST_GROUPS = 128


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(x · weightᵀ + bias)``.

    Args:
        x: [..., inputs].
        weight: [outputs, inputs].
        bias: [outputs].

    Returns:
        [..., outputs].
    """
    return F.relu(F.linear(x, weight, bias))


def supported(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel cannot run, or None."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, bias))
        return f"x, weight and bias must be [..., inputs], [outputs, inputs] and [outputs], and they are {shapes}"
    if x.dtype not in TYPES or {weight.dtype, bias.dtype} != {x.dtype}:
        types = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight, bias))
        return f"x, weight and bias must all be float32, bfloat16 or float16, and they are {types}"
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return "x, weight and bias must be contiguous"
    if {weight.device, bias.device} != {x.device}:
        return f"x, weight and bias are on different devices: {x.device}, {weight.device}, {bias.device}"
    return cannot_run(x)


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`reference` with one kernel for the product, and one for the two smaller gradients.

    Raises:
        NotImplementedError: with the text of :func:`supported`.
    """
    if reason := supported(x, weight, bias):
        raise NotImplementedError(reason)
    return _forward(x, weight, bias)


def _rows(tensor: Tensor) -> Tensor:
    return tensor[None].flatten(0, -2)


@torch.library.custom_op("opt_ops::bias_relu", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # PyTorch has no public name for the product that applies bias and ReLU before it writes.
    product = torch.ops.aten._addmm_activation.default  # noqa: SLF001
    return product(bias, _rows(x), weight.t()).view(*x.shape[:-1], len(weight))


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(bias))


@torch.library.custom_op("opt_ops::bias_relu_backward", mutates_args=())
def _backward(gradient: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the product and of the bias, from gradient and value of the output, which are contiguous."""
    columns = output.shape[-1]
    rows = len(_rows(output))
    group = max(_LEAST_ROWS, _TILE_ROWS * triton.cdiv(rows, _MOST_GROUPS * _TILE_ROWS))
    groups = triton.cdiv(rows, group)
    product = torch.empty_like(output)
    sums = torch.empty(groups, columns, dtype=torch.float32, device=output.device)
    if output.numel():
        with torch.cuda.device_of(output):
            _backward_kernel[(triton.cdiv(columns, _TILE_COLUMNS), groups)](
                *(gradient, output, product, sums, rows, columns, group), **_TILE, num_warps=_WARPS
            )
    return product, sums.sum(0).to(output.dtype)


@_backward.register_fake
def _(gradient: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), output.new_empty(output.shape[-1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, output = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    product, bias = _backward(gradient.contiguous(), output)
    rows = _rows(product)
    return (
        (rows @ weight).view_as(x) if of_x else None,
        rows.t() @ _rows(x) if of_weight else None,
        bias if of_bias else None,
    )


_forward.register_autograd(_gradients, setup_context=_keep)


@jit(do_not_specialize=["rows", "group"])
def _backward_kernel(
    gradient, output, product, sums, rows, columns, group, tile_rows: constexpr, tile_columns: constexpr
):
    """Each program multiplies ``group`` rows of one tile of columns, and sums them. Products are [rows, columns]."""
    column = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)
    inside = column < columns
    total = tl.zeros([tile_rows, tile_columns], tl.float32)
    for first in range(0, group, tile_rows):
        row = tl.program_id(1).to(tl.int64) * group + first + tl.arange(0, tile_rows)
        at = row[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(output + at, mask=mask, other=0.0)
        upstream = tl.load(gradient + at, mask=mask, other=0.0)
        # As in PyTorch, a NaN lets the gradient pass, so that trouble shows.
        passed = tl.where(value <= 0, 0.0, upstream)
        tl.store(product + at, passed, mask=mask)
        total += passed.to(tl.float32)
    tl.store(sums + tl.program_id(1) * columns + column, tl.sum(total, 0), mask=inside)


def compilations(hidden: int, dtype: torch.dtype, tp: int = 1) -> list[Compilation]:
    """The kernel of a layer with this hidden size, of which ``tp`` ranks share each product."""
    types = dict.fromkeys(("gradient", "output", "product"), f"*{TYPES[dtype]}") | {"sums": "*fp32"}
    numbers = dict.fromkeys(("rows", "columns", "group"), "i32")
    return [
        Compilation(
            op="bias_relu",
            kernel="backward",
            function=_backward_kernel,
            signature={**types, **numbers, **dict.fromkeys(_TILE, "constexpr")},
            constexprs=_TILE,
            divisible=frozenset({*types, *(["columns"] if 4 * hidden // tp % 16 == 0 else [])}),
            num_warps=_WARPS,
            shape={"hidden": hidden},
            dtype=TYPES[dtype],
        )
    ]
