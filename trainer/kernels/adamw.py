"""AdamW in one pass over gradient, master weight and moments: ``adamw.cu``."""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.kernels import nvrtc, thread_shim

SOURCE = Path(__file__).with_suffix(".cu")

# Kernels by the types of gradients and copies.
KERNELS: dict[tuple[torch.dtype, torch.dtype | None], str] = {
    (torch.float32, None): "adamw_fp32",
    (torch.float32, torch.bfloat16): "adamw_fp32_bf16",
    (torch.float32, torch.float16): "adamw_fp32_fp16",
    (torch.bfloat16, None): "adamw_bf16",
    (torch.bfloat16, torch.bfloat16): "adamw_bf16_bf16",
    (torch.float16, None): "adamw_fp16",
    (torch.float16, torch.float16): "adamw_fp16_fp16",
}
NAMES = (*KERNELS.values(), "adamw_squares")

CHUNK = 16384  # elements of a block, a multiple of 8. One vector of a tensor's start keeps all its chunks aligned.
THREADS = {"cuda": 256, "cpu": 32}  # of a block, at most 256; on a CPU each is a thread of the process


@torch.no_grad()
def reference(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    """Update ``masters``, moments and ``copies`` in place. The order of operations is that of torch's AdamW.

    Args:
        gradients: of each master.
        masters: fp32 weights.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        copies: of the masters in bf16 or fp16, written from the new masters. None if there are none.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        step: number of this update, from 1.
        factor: fp32 tensor of one element, by which gradients are multiplied: clipping, and what undoes the loss scale.
            If it is not finite, nothing is changed, and the result is zero.

    Returns:
        fp32 [number of masters]: the sum of squares of what was added to each, weight decay included.
    """
    bias_1, bias_2 = (1 - beta**step for beta in betas)
    overflow = ~factor.isfinite()
    squares: list[Tensor] = []
    for i, (gradient, master, mean, square) in enumerate(zip(gradients, masters, exp_avgs, exp_avg_sqs, strict=True)):
        written = [master, mean, square] if copies is None else [master, mean, square, copies[i]]
        before = [tensor.clone() for tensor in written]
        scaled = gradient.float() * factor
        master.mul_(1 - lr * weight_decay)
        mean.lerp_(scaled, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        master.addcdiv_(mean, (square.sqrt() / math.sqrt(bias_2)).add_(eps), value=-lr / bias_1)
        if copies is not None:
            copies[i].copy_(master)
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(torch.where(overflow, old, tensor))
        squares.append((master - before[0]).square().sum())
    return torch.stack(squares) if squares else factor.new_zeros(0)


def supported(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> str | None:
    """Why the kernel cannot run, or None."""
    lists = {"gradients": gradients, "masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {} if copies is None else {"copies": copies}
    for name, tensors in lists.items():
        if len(tensors) != len(masters):
            return f"there are {len(masters)} masters and {len(tensors)} {name}"
        types = {tensor.dtype for tensor in tensors}
        if name not in ("gradients", "copies") and types - {torch.float32}:
            return f"{name} must be fp32, not {_words(types)}"
        for i, (tensor, master) in enumerate(zip(tensors, masters, strict=True)):
            if tensor.numel() != master.numel():
                return f"{name}[{i}] has {tensor.numel()} elements and its master {master.numel()}"
            if tensor.device != factor.device:
                return f"{name}[{i}] is on {tensor.device} and factor on {factor.device}"
            if not tensor.is_contiguous():
                return f"{name}[{i}] is not contiguous"
    of_gradients, of_copies = {g.dtype for g in gradients}, {c.dtype for c in copies or ()}
    if masters and (len(of_gradients) > 1 or len(of_copies) > 1 or (_types(gradients, copies) not in KERNELS)):
        return f"there is no kernel for gradients in {_words(of_gradients)} and copies in {_words(of_copies) or 'none'}"
    if factor.numel() != 1 or factor.dtype != torch.float32:
        return f"factor must be one fp32 number, not {factor.numel()} of {factor.dtype}"
    if step < 1:
        return f"updates are counted from 1, and step is {step}"
    return cannot_run(factor.device)


def cannot_run(device: torch.device) -> str | None:
    """Why the kernel cannot run on ``device``, whatever the tensors are. None: it can."""
    if device.type == "meta":
        return None  # nothing runs there
    if device.type == "cpu":
        return thread_shim.cannot_run()
    if device.type != "cuda":
        return f"the kernel is for CUDA and CPU, not for {device.type}"
    from trainer.kernels.jit import LEAST_ARCHITECTURE  # imports Triton, which this op does not need

    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < LEAST_ARCHITECTURE:
        return f"the GPU is sm_{major}{minor}, and the kernel needs sm_{LEAST_ARCHITECTURE} or newer"
    return nvrtc.cannot_compile()


def _words(types: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def _types(gradients: Sequence[Tensor], copies: Sequence[Tensor] | None) -> tuple[torch.dtype, torch.dtype | None]:
    return gradients[0].dtype, copies[0].dtype if copies else None


@torch.no_grad()
def fused(
    gradients: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    """:func:`reference` as one kernel, launched once for many tensors. The host waits for nothing.

    Raises:
        NotImplementedError: with the text of :func:`supported`.
    """
    keywords = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step, "factor": factor}
    if reason := supported(gradients, masters, exp_avgs, exp_avg_sqs, copies, **keywords):
        raise NotImplementedError(reason)
    if not masters:
        return factor.new_zeros(0)
    return _adamw(
        list(gradients), list(masters), list(exp_avgs), list(exp_avg_sqs), list(copies or ()),
        lr, *betas, eps, weight_decay, step, factor,
    )  # fmt: skip


# One operation for a profiler, torch.compile and the meta device.
@torch.library.custom_op("opt_ops::adamw", mutates_args=("masters", "exp_avgs", "exp_avg_sqs", "copies"))
def _adamw(
    gradients: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    numbers = Numbers(
        decay=lr * weight_decay,
        take_1=1 - beta_1,
        keep_2=beta_2,
        take_2=1 - beta_2,
        step_size=lr / (1 - beta_1**step),
        inverse_root=1 / math.sqrt(1 - beta_2**step),
        eps=eps,
    )
    lists = (gradients, masters, exp_avgs, exp_avg_sqs, copies or None)
    return Update(lists, numbers, factor).run()


@_adamw.register_fake
def _(
    gradients: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor,
) -> Tensor:
    return factor.new_empty(len(masters))


class Numbers(ctypes.Structure):
    """What the kernel gets by value: ``Numbers`` of adamw.cu."""

    _fields_ = [
        (name, ctypes.c_float) for name in ("decay", "take_1", "keep_2", "take_2", "step_size", "inverse_root", "eps")
    ]


class Update:
    """The two launches of an update: the first updates, the second adds up the partial sums of its blocks.

    Args:
        lists: gradients, masters, both moments, and copies or None.
        numbers: for the kernel.
        factor: on the device.
        chunk: elements of a block.
    """

    def __init__(
        self,
        lists: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None],
        numbers: Numbers,
        factor: Tensor,
        chunk: int = CHUNK,
    ) -> None:
        gradients, masters, means, seconds, copies = lists
        rows: list[int] = []
        blocks = 0
        for i, master in enumerate(masters):
            tensors = (gradients[i], master, means[i], seconds[i])
            rows += [tensor.data_ptr() for tensor in tensors]
            rows += [copies[i].data_ptr() if copies else 0, master.numel(), blocks]
            blocks += -(-master.numel() // chunk)
        rows += [0] * 6 + [blocks]  # the end of the last tensor
        self.blocks, self.tensors, self.device = blocks, len(masters), factor.device
        self.kept = lists, factor  # the kernel has their addresses only
        on_gpu = self.device.type == "cuda"
        # From pinned memory the copy does not wait for the GPU. torch keeps that memory until the copy is done.
        self.table = torch.tensor(rows, pin_memory=on_gpu).to(self.device, non_blocking=True)
        self.partial_sums = factor.new_empty(max(1, blocks))
        self.squares = factor.new_empty(len(masters))
        self.kernel = KERNELS[_types(gradients, copies)]
        table, partial_sums = ctypes.c_void_p(self.table.data_ptr()), ctypes.c_void_p(self.partial_sums.data_ptr())
        counts = (ctypes.c_int(len(masters)), ctypes.c_int(chunk))
        self.arguments = (table, *counts, numbers, ctypes.c_void_p(factor.data_ptr()), partial_sums)
        self.of_sums = (table, partial_sums, ctypes.c_void_p(self.squares.data_ptr()))

    def run(self) -> Tensor:
        """Launch both. Returns the sum of squares of each tensor."""
        if self.device.type == "cuda":
            threads = THREADS["cuda"]
            if self.blocks:
                nvrtc.launch(SOURCE, self.kernel, self.blocks, threads, self.arguments, self.device)
            nvrtc.launch(SOURCE, "adamw_squares", self.tensors, threads, self.of_sums, self.device)
        else:
            self.run_on_cpu()
        return self.squares

    def run_on_cpu(self, blocks: Sequence[int] | None = None) -> None:
        """Run ``blocks``, by default all, in the shim; then add up."""
        threads = THREADS["cpu"]
        thread_shim.launch(SOURCE, NAMES, self.kernel, self.blocks, threads, self.arguments, blocks)
        thread_shim.launch(SOURCE, NAMES, "adamw_squares", self.tensors, threads, self.of_sums)
