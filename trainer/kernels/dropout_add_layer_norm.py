"""The end of one residual branch and the norm before the next: ``LayerNorm(residual + dropout(x))``.

The kernels read and write each activation once: 4 of them forward, 5 backward (7 for rows of more than 8,192 channels,
which do not fit into the registers of a program). The mask is no activation. The backward pass draws it again.

The same shape on the same GPU gives the same bits: gradients of weight and bias are summed by program, and the sums of
the programs in a second step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.hashing import MASK, ODD, mix32_, mix_
from trainer.kernels.jit import TYPES, Compilation, cannot_run, constexpr, jit, tl

Site = int | Tensor

# No program holds wider rows, forward. Backward it holds three rows and two sums, so wider rows are cut into tiles.
_MOST_CHANNELS = 16_384
_MOST_CHANNELS_BACKWARD = 8_192
_TILE = 2_048

# Backward, a program has 16 rows, or more where that makes more than 384 programs: 3 for each multiprocessor of an
# H200, as fit there at 2,048 channels. The sums of all programs are then at most 4 % of the traffic at 16,384 tokens.
# Which numbers are fastest was not measured.
_LEAST_ROWS = 16
_MOST_PROGRAMS = 384


def keep_mask(shape: torch.Size, p: float, site: Site, now: Tensor) -> Tensor:
    """The mask of a dropout: False, with probability ``p``, for elements that are dropped.

    It is a hash of seed, step, site, sample index in the lineage, token position in the sequence, and channel. So a
    rank that holds a slice of the activation computes that slice of the mask. The loss is the same in every
    data-parallel and tensor-parallel layout, and after a restart. There is no generator state to save.

    Args:
        shape: [batch, sequence, channel] of this rank's part.
        p: probability that an element is dropped.
        site: number of the dropout within the model.
        now: [key of seed and step, first sample, first position], int64, on the device of the result.

    Returns:
        Boolean tensor of that shape.
    """
    batch, length, channels = shape
    seed_and_step, first_sample, first_position = now.unbind()
    samples = torch.arange(batch, device=now.device) + first_sample
    positions = torch.arange(length, device=now.device) + first_position
    salt = mix_((seed_and_step + site + ODD) & MASK)  # equals key(seed, step, site)
    tokens = mix_((mix_((samples + salt) & MASK)[:, None] + positions) & MASK).to(torch.int32)
    elements = mix32_(tokens[:, :, None] + torch.arange(channels, dtype=torch.int32, device=now.device))
    # int32 has the right bits, and the wrong order: 2³¹ more makes it that of unsigned numbers.
    return elements.bitwise_xor_(-(2**31)) >= round(p * 2**32) - 2**31


def reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Site, p: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add the branch to the stream, and norm the sum.

    Args:
        x: the result of the branch, [batch, sequence, channel].
        residual: the stream, of the same shape and type.
        weight: of the norm, [channel].
        bias: of the norm, [channel].
        now: as in :func:`keep_mask`.
        site: number of the dropout within the model: an integer, or an int64 scalar on the CPU, which compiled code
            does not take as a constant.
        p: probability that an element of ``x`` is dropped. 0 in evaluation.
        eps: of the norm.

    Returns:
        The sum, rounded to the type of the stream, and its norm.
    """
    if p:
        x = torch.where(keep_mask(x.shape, p, site, now), x * (1.0 / (1.0 - p)), 0.0)
    total = residual + x
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def supported(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Site, p: float, eps: float = 1e-5
) -> str | None:
    """Why the kernel cannot run, or None."""
    if x.dim() != 3 or x.shape != residual.shape or weight.shape != x.shape[2:] or bias.shape != x.shape[2:]:
        shapes = ", ".join(str(list(it.shape)) for it in (x, residual, weight, bias))
        return f"x and residual must be [batch, sequence, channel], weight and bias [channel], and they are {shapes}"
    if not 1 <= x.shape[2] <= _MOST_CHANNELS:
        return f"there must be 1 to {_MOST_CHANNELS} channels, and there are {x.shape[2]}"
    if x.dtype not in TYPES or x.dtype != residual.dtype:
        return f"x and residual must both be float32, bfloat16 or float16, and they are {_types(x, residual)}"
    if weight.dtype not in TYPES or weight.dtype != bias.dtype:
        return f"weight and bias must both be float32, bfloat16 or float16, and they are {_types(weight, bias)}"
    if now.shape != (3,) or now.dtype != torch.int64:
        return f"now must be int64 [3], and it is {_types(now)} {list(now.shape)}"
    if isinstance(site, Tensor) and (site.dim() or site.dtype != torch.int64 or site.is_cuda):
        return f"site must be an integer or an int64 scalar on the CPU, and it is {_types(site)} on {site.device}"
    if not (0.0 <= p < 1.0 and _threshold(p) < 2**32):
        return f"p must be at least 0 and less than 1, and it is {p}"
    tensors = {"residual": residual, "weight": weight, "bias": bias, "now": now}
    if elsewhere := [name for name, it in tensors.items() if it.device != x.device]:
        return f"all tensors but site must be on the device of x, {x.device}, and these are not: {', '.join(elsewhere)}"
    if strided := [name for name, it in {"x": x, **tensors}.items() if not it.is_contiguous()]:
        return f"all tensors must be contiguous, and these are not: {', '.join(strided)}"
    return cannot_run(x)


def _types(*tensors: Tensor) -> str:
    return ", ".join(str(it.dtype).removeprefix("torch.") for it in tensors)


def _threshold(p: float) -> int:
    return round(p * 2**32)


def fused(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Site, p: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`reference` as one kernel. In bf16 and fp16 the dropout's result is not rounded before the sum is.

    Raises:
        NotImplementedError: with the text of :func:`supported`.
    """
    if reason := supported(x, residual, weight, bias, now, site, p, eps):
        raise NotImplementedError(reason)
    if not isinstance(site, Tensor):
        site = torch.tensor(site, device="cpu")
    total, normed, _, _ = _forward(x, residual, weight, bias, now, site, p, eps)
    return total, normed


def compilations(hidden: int, dtype: torch.dtype) -> list[Compilation]:
    """The kernels of a training step with this hidden size, in the form of :class:`Compilation`."""
    forward, backward = _forward_options(hidden, 0.1, 1e-5), _backward_options(hidden, 0.1)
    if _whole_rows(hidden):
        return [
            _compilation("forward", _forward_kernel, forward, hidden, TYPES[dtype]),
            _compilation("backward", _backward_kernel, {"products": None, **backward}, hidden, TYPES[dtype]),
        ]
    return [
        _compilation("forward", _forward_kernel, forward, hidden, TYPES[dtype]),
        _compilation("backward_products", _products_kernel, _products_options(hidden), hidden, TYPES[dtype]),
        _compilation("backward", _backward_kernel, backward, hidden, TYPES[dtype]),
    ]


def _compilation(name: str, kernel: Any, options: dict[str, Any], hidden: int, dtype: str) -> Compilation:
    """Parameters that are not in ``options`` have these types, or that of ``x``."""
    types = dict.fromkeys(("site", "length", "rows", "group"), "i32") | {"now": "*i64"}
    types |= dict.fromkeys(("mean", "inverse", "products", "sums"), "*fp32")
    signature = {it: "constexpr" if it in options else types.get(it, f"*{dtype}") for it in kernel.arg_names}
    return Compilation(
        op="dropout_add_layer_norm",
        kernel=name,
        function=kernel,
        signature=signature,
        constexprs={it: value for it, value in options.items() if it != "num_warps"},
        divisible=frozenset(it for it, type_ in signature.items() if type_.startswith("*")),
        num_warps=options["num_warps"],
        shape={"hidden": hidden},
        dtype=dtype,
    )


# ---- the two ops, as the meta device, the profiler and the compiler see them


@torch.library.custom_op("opt_ops::dropout_add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, now: Tensor, site: Tensor, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, and of each row the mean and the inverse of the standard deviation, in fp32."""
    batch, length, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(batch * length, dtype=torch.float32, device=x.device)
    inverse = torch.empty_like(mean)
    if batch * length:
        with torch.cuda.device_of(x):
            _forward_kernel[(batch * length,)](
                *(x, residual, weight, bias, now, total, normed, mean, inverse, int(site), length),
                **_forward_options(width, p, eps),
            )
    return total, normed, mean, inverse


@_forward.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("opt_ops::dropout_add_layer_norm_backward", mutates_args=())
def _backward(
    of_total: Tensor | None,
    of_normed: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    now: Tensor,
    site: Tensor,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of residual and x, and [2, channel] of weight and bias.

    One of the upstream gradients may be None. Without dropout the gradient of x is that of the residual, and the second
    result is empty. Without an upstream gradient of the norm the third is.
    """
    batch, length, width = total.shape
    rows = batch * length
    group = max(_LEAST_ROWS, -(-rows // _MOST_PROGRAMS))
    groups = -(-rows // group)
    of_residual = torch.empty_like(total)
    of_x = torch.empty_like(total) if p else total.new_empty(0)
    sums = torch.empty(groups, 2, width, dtype=torch.float32, device=total.device)
    products = None
    with torch.cuda.device_of(total):
        if rows and of_normed is not None and not _whole_rows(width):
            products = torch.empty(rows, 2, dtype=torch.float32, device=total.device)
            _products_kernel[(rows,)](of_normed, total, weight, mean, inverse, products, **_products_options(width))
        if rows:
            options = _backward_options(width, p)
            _backward_kernel[(-(-width // options["TILE"]), groups)](
                *(of_total, of_normed, total, weight, mean, inverse, products, now, of_residual, of_x, sums),
                *(int(site), length, rows, group),
                **options,
            )
    return of_residual, of_x, weight.new_empty(0) if of_normed is None else sums.sum(0).to(weight.dtype)


@_backward.register_fake
def _(_: Tensor | None, of_normed: Tensor | None, total: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_x = torch.empty_like(total) if rest[-1] else total.new_empty(0)
    of_norm = weight.new_empty(0) if of_normed is None else weight.new_empty(2, weight.shape[0])
    return torch.empty_like(total), of_x, of_norm


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, now, site, ctx.p, _ = inputs
    total, _, mean, inverse = output
    ctx.set_materialize_grads(False)  # a result that nobody used has no gradient, and then none is read
    ctx.save_for_backward(total, weight, mean, inverse, now, site)


def _gradients(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    of_total, of_normed = (it if it is None else it.contiguous() for it in (of_total, of_normed))
    if of_normed is None and (of_total is None or not ctx.p):
        return of_total, of_total, None, None, None, None, None, None
    of_residual, of_x, of_norm = _backward(of_total, of_normed, *ctx.saved_tensors, ctx.p)
    of_weight, of_bias = (None, None) if of_normed is None else of_norm.unbind()
    return of_x if ctx.p else of_residual, of_residual, of_weight, of_bias, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


# ---- the kernels, and what each is compiled with


def _dropout(p: float) -> dict[str, Any]:
    return {"THRESHOLD": _threshold(p) if p else None, "SCALE": 1.0 / (1.0 - p)}


def _whole_rows(width: int) -> bool:
    return width <= _MOST_CHANNELS_BACKWARD


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _forward_options(width: int, p: float, eps: float) -> dict[str, Any]:
    block = _block(width)
    return {**_dropout(p), "EPS": eps, "WIDTH": width, "BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def _products_options(width: int) -> dict[str, Any]:
    return {"WIDTH": width, "TILE": _TILE, "num_warps": _TILE // 256}


def _backward_options(width: int, p: float) -> dict[str, Any]:
    tile = _block(width) if _whole_rows(width) else _TILE
    return {**_dropout(p), "WIDTH": width, "TILE": tile, "num_warps": max(1, tile // 256)}


@jit
def _mix(x):
    """:func:`trainer.hashing.mix` of uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@jit
def _dropped(value, now, site, row, length, columns, THRESHOLD: constexpr, SCALE: constexpr):
    """``value`` after dropout. The mask is that of :func:`keep_mask`, in integers of 32 bits that wrap."""
    salt = _mix(tl.load(now).to(tl.uint32) + site.to(tl.uint32) + 0x9E3779B9)
    sample = (tl.load(now + 1) + row // length).to(tl.uint32)
    position = (tl.load(now + 2) + row % length).to(tl.uint32)
    token = _mix(_mix(sample + salt) + position)
    return tl.where(_mix(token + columns.to(tl.uint32)) >= THRESHOLD, value * SCALE, 0.0)


@jit(do_not_specialize=("site", "length"))
def _forward_kernel(
    x, residual, weight, bias, now, total, normed, mean, inverse, site, length,
    THRESHOLD: constexpr, SCALE: constexpr, EPS: constexpr, WIDTH: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = row.to(tl.int64) * WIDTH + columns
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if THRESHOLD is not None:
        value = _dropped(value, now, site, row, length, columns, THRESHOLD, SCALE)
    rounded = (tl.load(residual + at, inside, 0.0).to(tl.float32) + value).to(total.dtype.element_ty)
    tl.store(total + at, rounded, inside)
    value = rounded.to(tl.float32)
    average = tl.sum(value, 0) / WIDTH
    centred = tl.where(inside, value - average, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / WIDTH + EPS)
    tl.store(mean + row, average)
    tl.store(inverse + row, scale)
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    tl.store(normed + at, centred * scale * gain + shift, inside)


@jit
def _products_kernel(of_normed, total, weight, mean, inverse, products, WIDTH: constexpr, TILE: constexpr):
    """One row a program, tile by tile: the two means that the gradient of a norm needs. ``products``: [row, 2]."""
    row = tl.program_id(0)
    average = tl.load(mean + row)
    scale = tl.load(inverse + row)
    plain = tl.zeros([TILE], tl.float32)
    with_unit = tl.zeros([TILE], tl.float32)
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < WIDTH
        at = row.to(tl.int64) * WIDTH + columns
        gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
        scaled = tl.load(of_normed + at, inside, 0.0).to(tl.float32) * gain
        plain += scaled
        with_unit += scaled * (tl.load(total + at, inside, 0.0).to(tl.float32) - average) * scale
    products += row.to(tl.int64) * 2
    tl.store(products, tl.sum(plain, 0) / WIDTH)
    tl.store(products + 1, tl.sum(with_unit, 0) / WIDTH)


@jit(do_not_specialize=("site", "length", "rows", "group"))
def _backward_kernel(
    of_total, of_normed, total, weight, mean, inverse, products, now, of_residual, of_x, sums,
    site, length, rows, group, THRESHOLD: constexpr, SCALE: constexpr, WIDTH: constexpr, TILE: constexpr,
):  # fmt: skip
    """``group`` rows of a tile a program, one after another. ``sums``: [program, 2, channel], of weight and bias.

    Without ``products`` a tile is a whole row.
    """
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    of_weight = tl.zeros([TILE], tl.float32)
    of_bias = tl.zeros([TILE], tl.float32)
    first = tl.program_id(1) * group
    for i in range(tl.minimum(group, rows - first)):
        row = first + i
        at = row.to(tl.int64) * WIDTH + columns
        value = tl.zeros([TILE], tl.float32)
        if of_normed is not None:
            scale = tl.load(inverse + row)
            upstream = tl.load(of_normed + at, inside, 0.0).to(tl.float32)
            unit = (tl.load(total + at, inside, 0.0).to(tl.float32) - tl.load(mean + row)) * scale
            of_weight += upstream * unit
            of_bias += upstream
            scaled = upstream * gain
            if products is None:
                plain = tl.sum(scaled, 0) / WIDTH
                with_unit = tl.sum(scaled * unit, 0) / WIDTH
            else:
                plain = tl.load(products + row.to(tl.int64) * 2)
                with_unit = tl.load(products + row.to(tl.int64) * 2 + 1)
            value = (scaled - plain - unit * with_unit) * scale
        if of_total is not None:
            value += tl.load(of_total + at, inside, 0.0).to(tl.float32)
        tl.store(of_residual + at, value, inside)
        if THRESHOLD is not None:
            tl.store(of_x + at, _dropped(value, now, site, row, length, columns, THRESHOLD, SCALE), inside)
    if of_normed is not None:
        sums += tl.program_id(1).to(tl.int64) * 2 * WIDTH + columns
        tl.store(sums, of_weight, inside)
        tl.store(sums + WIDTH, of_bias, inside)
