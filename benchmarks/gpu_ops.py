"""Each op of ``trainer/kernels`` beside its compiled reference: worst error, ratio of times, and memory traffic."""

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_measure import CUDA, DEVICE, seconds_of
from trainer.kernels import records
from trainer.kernels.choice import OPS

SIZES = {"1.3b": (8192, 2048), "6.7b": (8192, 4096)}  # tokens, channels
TINY = {"tiny": (8, 64)}
MOST_ERROR = 0.02  # of a result or gradient in bf16, whose numbers have 8 bits
Inputs = tuple[list[Any], dict[str, Any]]


def compare_ops(*, rehearse: bool, left: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each op. ``text`` is for people; the rest is a record (:class:`trainer.kernels.records.Record`).

    Args:
        rehearse: tiny shapes; on a CPU without TRITON_INTERPRET=1 the kernels cannot run, and the row says so.
        left: seconds that are left.
    """
    dtype = torch.bfloat16 if CUDA else torch.float32
    major, minor = torch.cuda.get_device_capability() if CUDA else (0, 0)
    rows = []
    for op, module in OPS.items():
        row: dict[str, Any] = {
            "op": op,
            "architecture": 10 * major + minor,
            "dtype": "bf16" if CUDA else "fp32",
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "triton": __import__("triton").__version__ if find_spec("triton") else "none",
            "sha256": records.sha256(op),
            "passed": False,
            "worst_error": 0.0,
            "ratio": {},
        }
        texts = []
        for size, (tokens, channels) in (TINY if rehearse else SIZES).items():
            if left() < 8:
                texts.append(f"{size} not measured")
                continue
            text = _one(op, module, size, INPUTS[op](tokens, channels, dtype), dtype, row)
            texts.append(text)
        row["passed"] = set(row["ratio"]) == set(records.SIZES) and row["worst_error"] <= MOST_ERROR
        row["text"] = f"{op} {', '.join(texts)}"
        rows.append(row)
    return rows


def _one(op: str, module: Any, size: str, made: Inputs, dtype: torch.dtype, row: dict[str, Any]) -> str:
    arguments, named = made
    if reason := module.supported(*arguments, **named):
        return f"{size} cannot run: {reason}"
    error = _error(op, module, made)
    row["worst_error"] = max(row["worst_error"], error)
    if not CUDA:
        return f"{size} error {error:.1e}"
    reference = torch.compile(module.reference)
    others = _copy(made)
    times = [
        seconds_of([lambda m=m, f=function: _call(op, f, m) for m in (made, others)])
        for function in (reference, module.fused)
    ]
    row["ratio"][size] = ratio = times[0] / times[1]
    moved = BYTES[op](arguments, dtype)
    return f"{size} error {error:.1e}, ratio {ratio:.2f}, {moved / times[1] / 1e9:.0f} GB/s"


def _call(op: str, function: Callable[..., Any], made: Inputs) -> list[Tensor]:
    """Forward and backward pass. Returns results and gradients."""
    arguments, named = made
    if op == "adamw":
        return [function(*arguments, **named), *arguments[1], *arguments[2], *arguments[3]]
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    # The kernel of cross_entropy writes the gradient over the logits, so each call has logits of its own.
    inputs = [a * 1 if a is wanted[0] and op == "cross_entropy" else a for a in arguments]
    found = function(*inputs, **named)
    results = list(found) if isinstance(found, tuple) else [found]
    return results + list(torch.autograd.grad(results, wanted, [torch.ones_like(r) * 0.7 for r in results]))


def _error(op: str, module: Any, made: Inputs) -> float:
    """The largest difference of a result or gradient from the reference in fp32, relative to its largest number."""
    expected = _call(op, module.reference, _copy(made, torch.float32))
    found = _call(op, module.fused, _copy(made))
    errors = []
    for ours, theirs in zip(found, expected, strict=True):
        size = theirs.float().abs().max().clamp(min=1e-12)
        errors.append(((ours.float() - theirs.float()).abs().max() / size).item())
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _copy(made: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(each) for each in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(value.requires_grad)

    return [copied(a) for a in made[0]], {key: copied(value) for key, value in made[1].items()}


def _random(*shape: int, dtype: torch.dtype, gradient: bool = True) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(gradient)


def _norm(tokens: int, channels: int, dtype: torch.dtype) -> Inputs:
    shape = (4, tokens // 4, channels)
    now = torch.tensor([12345, 0, 0], dtype=torch.int64, device=DEVICE)
    branch, stream = _random(*shape, dtype=dtype), _random(*shape, dtype=dtype)
    weight, bias = _random(channels, dtype=dtype), _random(channels, dtype=dtype)
    return [branch, stream, weight, bias, now, torch.tensor(3), 0.1], {}


def _loss(tokens: int, channels: int, dtype: torch.dtype) -> Inputs:
    words, columns = (50272, 50304) if channels > 64 else (500, 512)
    targets = torch.randint(0, words, (tokens,), device=DEVICE)
    return [_random(tokens, columns, dtype=dtype), targets, words], {}


def _relu(tokens: int, channels: int, dtype: torch.dtype) -> Inputs:
    x, weight = _random(tokens, channels, dtype=dtype), _random(4 * channels, channels, dtype=dtype)
    return [x, weight, _random(4 * channels, dtype=dtype)], {}


def _adamw(tokens: int, channels: int, dtype: torch.dtype) -> Inputs:
    """The matrices of two layers: what one launch updates."""
    count = 2 if channels > 64 else 1
    shapes = [(channels, channels)] * 4 * count + [(4 * channels, channels)] * 2 * count
    lists = [[_random(*shape, dtype=torch.float32, gradient=False) for shape in shapes] for _ in range(4)]
    lists[3] = [value.abs() for value in lists[3]]
    copies = [master.bfloat16() for master in lists[1]]
    factor = torch.tensor(0.5, device=DEVICE)
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 10, "factor": factor}
    return [*lists, copies], options


INPUTS: dict[str, Callable[[int, int, torch.dtype], Inputs]] = {
    "dropout_add_layer_norm": _norm,
    "cross_entropy": _loss,
    "bias_relu": _relu,
    "adamw": _adamw,
}
# What an op must read and write, each once: gpu-path's counts of forward and backward pass.
BYTES: dict[str, Callable[[list[Any], torch.dtype], float]] = {
    "dropout_add_layer_norm": lambda a, dtype: 9 * a[0].numel() * dtype.itemsize,
    "cross_entropy": lambda a, dtype: 5 * a[0].numel() * dtype.itemsize,  # two for the copy that each call makes
    "bias_relu": lambda a, dtype: 16 * a[0].numel() * dtype.itemsize,  # without the products' own inputs
    "adamw": lambda a, _: 30 * sum(master.numel() for master in a[1]),
}
