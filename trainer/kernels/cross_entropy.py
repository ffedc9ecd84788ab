"""The loss over a vocabulary that tensor-parallel ranks may share.

The kernels read the logits once in the forward pass and once in the backward pass, which writes their gradient into
the same memory: 6 bytes a logit in bf16, and no second buffer.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.kernels.jit import TYPES, Compilation, cannot_run, constexpr, jit, tl

# The running maximum is kept for a whole block: one exponential a logit. A maximum for each lane would need two, more
# than the special-function units of an H100 compute while its memory delivers bf16 (arithmetic, not measured).
WIDEST = 8192  # columns of a block, at most
LANE = 32  # columns of a block that one thread holds: four loads of 128 bits in bf16

NO_WORD = torch.iinfo(torch.int64).min  # F.cross_entropy would leave out the target −100 without a word


class _Sum(torch.autograd.Function):
    """The sum over a group. Each rank's part has the gradient of the sum, which all ranks hold alike."""

    @staticmethod
    def forward(_ctx: object, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def reference(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The cross-entropy of each token, in nats.

    A logit of −inf is the probability 0. A row with NaN or +inf, or with −inf alone, has the loss NaN.

    Args:
        logits: [tokens, columns], this rank's part of the padded vocabulary.
        targets: int64 [tokens], the words of the whole vocabulary that were to be predicted.
        vocab_size: number of real words. Columns beyond them count nothing and get the gradient zero.
        first: the word of the first column.
        group: the ranks that share the vocabulary. None if there are no words but those of these columns.

    Returns:
        fp32 [tokens], the same on all ranks of ``group``.

    Raises:
        IndexError: without a group and on a CPU, a target lies outside the vocabulary. With a group its loss is NaN.
    """
    words = _words(logits.shape[1], vocab_size, first)
    real = logits[:, :words].float()
    if group is None:
        return F.cross_entropy(real, targets - first, ignore_index=NO_WORD, reduction="none")
    largest = real.detach().amax(1) if words else real.new_full(targets.shape, -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    shifted = real - largest[:, None]
    own = targets - first
    mine = (own >= 0) & (own < words)
    at_target = shifted.new_zeros(targets.shape)
    if words:
        at_target = torch.where(mine, shifted.gather(1, own.clamp(0, words - 1)[:, None])[:, 0], 0.0)
    poison = largest.new_zeros(targets.shape).masked_fill_((targets < 0) | (targets >= vocab_size), torch.nan)
    sums = _Sum.apply(torch.stack([shifted.exp().sum(1) + poison, at_target]), group)
    assert isinstance(sums, Tensor)
    return sums[0].log() - sums[1]


def supported(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> str | None:
    """Why the kernels cannot run, or None."""
    if reason := cannot_run(logits):
        return reason
    if logits.dtype not in TYPES:
        return f"the logits are {logits.dtype}; the kernels take float32, float16 and bfloat16"
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        return f"logits and targets must have the shapes [tokens, columns] and [tokens], not {shapes}"
    if targets.dtype != torch.int64 or targets.device != logits.device:
        return f"the targets must be torch.int64 on {logits.device}, not {targets.dtype} on {targets.device}"
    if not (logits.is_contiguous() and targets.is_contiguous()):
        return "logits and targets must be contiguous"
    if first < 0 or vocab_size < 1:
        return f"first must be at least 0 and vocab_size at least 1, not {first} and {vocab_size}"
    return None


def fused(
    logits: Tensor, targets: Tensor, vocab_size: int, first: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """:func:`reference` as kernels. The backward pass writes the gradient over ``logits``.

    So after the backward pass ``logits`` holds the gradient, and whoever still reads it as logits is wrong. Autograd
    notices where it can: a second backward pass, or the backward pass of another operation that had saved the logits,
    raises RuntimeError. Whoever needs them afterwards passes a copy. Gradients of gradients do not exist.

    A target outside the vocabulary gives the loss NaN, and NaN to each logit of its row. Nothing waits for the GPU, so
    nothing is raised.

    Raises:
        NotImplementedError: with the text of :func:`supported`.
    """
    if reason := supported(logits, targets, vocab_size, first, group):
        raise NotImplementedError(reason)
    losses = _CrossEntropy.apply(logits, targets, vocab_size, first, group)
    assert isinstance(losses, Tensor)
    return losses


class _CrossEntropy(torch.autograd.Function):
    """The two ops, and between them the exchange with ``group``: 12 bytes a token."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        first: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        shared = group is not None
        statistics = torch.ops.opt_ops.cross_entropy_statistics(logits, targets, vocab_size, first, shared)
        maxima, sums = statistics[0], statistics[1:]
        if group is not None:
            local = maxima.clone()
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
            sums[0] *= (local - maxima).exp()
            dist.all_reduce(sums, group=group)
        ctx.save_for_backward(logits, targets, statistics)
        ctx.vocab_size, ctx.first = vocab_size, first  # pyright: ignore[reportAttributeAccessIssue]
        return sums[0].log() - (sums[1] - maxima)

    @staticmethod
    def backward(ctx: object, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy has no gradient of its gradient (create_graph=True): it keeps no logits for one. Use its"
                " reference (kernels=off)."
            )
        try:
            logits, targets, statistics = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError as error:
            raise RuntimeError(
                "cross_entropy has no logits left for a backward pass: an earlier one wrote the gradient over them, or"
                " something else changed them since the forward pass. For a second pass, call the op again on new"
                " logits, or use its reference (kernels=off)."
            ) from error
        torch.ops.opt_ops.cross_entropy_backward(
            logits,
            targets,
            statistics,
            upstream[0],
            ctx.vocab_size,  # pyright: ignore[reportAttributeAccessIssue]
            ctx.first,  # pyright: ignore[reportAttributeAccessIssue]
        )
        return logits.detach(), None, None, None, None


@torch.library.custom_op("opt_ops::cross_entropy_statistics", mutates_args=())
def _statistics(logits: Tensor, targets: Tensor, vocab_size: int, first: int, shared: bool) -> Tensor:
    """Return fp32 [3, tokens]: the maximum, the sum of exp(logit − maximum), and the target's logit, 0 if not here.

    The sum is NaN if no rank has the target. Other ranks have columns if the vocabulary is ``shared``.
    """
    statistics = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    if logits.shape[0]:
        words = _words(logits.shape[1], vocab_size, first)
        lowest, beyond = (0, vocab_size) if shared else (first, first + words)
        _statistics_kernel[(logits.shape[0],)](
            logits, targets, statistics, logits.shape[1], words, first, lowest, beyond, **_launch(logits.shape[1])
        )
    return statistics


@_statistics.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int, first: int, shared: bool) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("opt_ops::cross_entropy_backward", mutates_args={"logits"})
def _backward(
    logits: Tensor, targets: Tensor, statistics: Tensor, upstream: Tensor, vocab_size: int, first: int
) -> None:
    """Write the gradient over ``logits``. ``upstream`` may be expanded: its stride may be 0."""
    if logits.numel():
        columns = logits.shape[1]
        arguments = (upstream.stride(0), columns, _words(columns, vocab_size, first), first)
        _backward_kernel[(logits.shape[0],)](logits, targets, statistics, upstream, *arguments, **_launch(columns))


@_backward.register_fake
def _(logits: Tensor, targets: Tensor, statistics: Tensor, upstream: Tensor, vocab_size: int, first: int) -> None:
    return None


def _words(columns: int, vocab_size: int, first: int) -> int:
    """How many columns of this rank are real words."""
    return max(0, min(columns, vocab_size - first))


def _launch(columns: int) -> dict[str, int]:
    """Block and warps of both kernels. A block of a whole number of warps, however few columns there are."""
    block = min(WIDEST, max(128, 1 << (columns - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, block // (LANE * 32))}


# A bound of a mask counts for the width of loads. Triton sees that 50,304 columns and 50,272 words are divisible by 16,
# and loads 128 bits at a time. Otherwise each load would be of one logit. The other numbers only add compilations.


@jit(do_not_specialize=["first", "lowest", "beyond"])
def _statistics_kernel(logits, targets, statistics, columns, words, first, lowest, beyond, BLOCK: constexpr):
    """One row a program: maximum and sum of exponentials of its first ``words`` columns, and the target's logit."""
    row = tl.program_id(0).to(tl.int64)  # 42,690 rows of 50,304 pass 2³¹
    tokens = tl.num_programs(0).to(tl.int64)
    logits += row * columns
    largest = -float("inf")
    total = 0.0
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < words
        logit = tl.load(logits + column, mask=real, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(logit, 0))
        shift = tl.where(largest == -float("inf"), 0.0, largest)  # −inf less −inf would be NaN
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(logit - shift), 0)
    target = tl.load(targets + row)
    own = target - first
    at_target = tl.load(logits + own, mask=(own >= 0) & (own < words), other=0.0).to(tl.float32)
    total = tl.where((target >= lowest) & (target < beyond), total, float("nan"))
    tl.store(statistics + row, largest)
    tl.store(statistics + tokens + row, total)
    tl.store(statistics + 2 * tokens + row, at_target)


@jit(do_not_specialize=["upstream_stride", "first"])
def _backward_kernel(logits, targets, statistics, upstream, upstream_stride, columns, words, first, BLOCK: constexpr):
    """One row a program: upstream · (softmax − 1 at the target) over ``logits``, and 0 from column ``words`` on."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.num_programs(0).to(tl.int64)
    logits += row * columns
    largest = tl.load(statistics + row)
    inverse = 1.0 / tl.load(statistics + tokens + row)
    own = tl.load(targets + row) - first
    factor = tl.load(upstream + row * upstream_stride)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < words
        logit = tl.load(logits + column, mask=real, other=-float("inf")).to(tl.float32)
        probability = tl.exp(logit - largest) * inverse
        gradient = factor * tl.where(column == own, probability - 1.0, probability)
        gradient = tl.where(real, gradient, 0.0)
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)


def compilations(columns: int, vocab_size: int, dtype: torch.dtype, first: int = 0) -> list[Compilation]:
    """What the launches of a rank with these ``columns`` compile."""
    words, launch = _words(columns, vocab_size, first), _launch(columns)
    pointers = {"logits": f"*{TYPES[dtype]}", "targets": "*i64", "statistics": "*fp32"}
    numbers = dict.fromkeys(("columns", "words", "first"), "i32")
    signatures = {
        "forward": (_statistics_kernel, {**pointers, **numbers, "lowest": "i32", "beyond": "i32"}),
        "backward": (_backward_kernel, {**pointers, "upstream": "*fp32", "upstream_stride": "i32", **numbers}),
    }
    divisible = {name for name, number in (("columns", columns), ("words", words)) if number % 16 == 0}
    return [
        Compilation(
            op="cross_entropy",
            kernel=kernel,
            function=function,
            signature={**signature, "BLOCK": "constexpr"},
            constexprs={"BLOCK": launch["BLOCK"]},
            divisible=frozenset(divisible | {name for name, it in signature.items() if it.startswith("*")}),
            num_warps=launch["num_warps"],
            shape={"columns": columns},
            dtype=TYPES[dtype],
        )
        for kernel, (function, signature) in signatures.items()
    ]
