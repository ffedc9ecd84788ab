"""Each op of ``trainer/kernels`` beside its reference and Liger's kernel: worst error, times, memory traffic.

Liger's kernels were read in version 0.8.5. Its layer norm knows neither dropout nor the sum before it: PyTorch's do
that part. Its loss is of all columns, padding too, and is summed.
"""

import math
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_measure import CUDA, DEVICE, seconds_of
from trainer.kernels import records
from trainer.kernels.choice import OPS

SIZES = {"1.3b": (8192, 2048), "6.7b": (8192, 4096)}  # tokens, channels
TINY = {"tiny": (8, 64)}
MOST_ERROR = 0.02  # of a result or gradient in bf16, whose numbers have 8 bits
Inputs = tuple[list[Any], dict[str, Any]]


def compare_ops(*, rehearse: bool, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """A row for each op, one after the other.

    ``text`` is for people, and ``microseconds`` has by size what each contender took. The rest is a record
    (:class:`trainer.kernels.records.Record`).

    Args:
        rehearse: tiny shapes; on a CPU without TRITON_INTERPRET=1 the kernels cannot run, and the row says so.
        left: seconds that are left.
    """
    dtype = torch.bfloat16 if CUDA else torch.float32
    major, minor = torch.cuda.get_device_capability() if CUDA else (0, 0)
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
            "microseconds": {},
        }
        texts = []
        for size, (tokens, channels) in (TINY if rehearse else SIZES).items():
            if left() < 8:
                texts.append(f"{size} not measured")
                continue
            try:
                texts.append(f"{size} {_one(op, module, size, INPUTS[op](tokens, channels, dtype), dtype, row)}")
            except Exception as error:  # noqa: BLE001  this row says what failed, and the next op has its turn
                row["worst_error"] = math.inf
                texts.append(f"{size} failed: {_first_line(error)}")
        row["passed"] = set(row["ratio"]) == set(records.SIZES) and row["worst_error"] <= MOST_ERROR
        row["text"] = f"{op} {', '.join(texts)}"
        yield row


def _one(op: str, module: Any, size: str, made: Inputs, dtype: torch.dtype, row: dict[str, Any]) -> str:
    arguments, named = made
    if reason := module.supported(*arguments, **named):
        return f"cannot run: {reason}"
    error = _error(op, module, made)
    row["worst_error"] = max(row["worst_error"], error)
    sets = (made, _copy(made))
    kernel = _seconds(op, module.fused, sets)
    # A second size must not be compiled for sizes in general: that would be slower than what the trainer runs.
    compiled = _seconds(op, torch.compile(module.reference, dynamic=False), sets)
    eager = _seconds(op, module.reference, sets)
    liger = _liger(op, sets)
    taken = {"kernel": kernel, "compiled": compiled, "eager": eager, "liger": liger}
    row["microseconds"][size] = {name: t * 1e6 if isinstance(t, float) else t for name, t in taken.items()}
    ratio = compiled / kernel
    if CUDA:
        row["ratio"][size] = ratio
    theirs = f"{liger * 1e6:.0f}" if isinstance(liger, float) else liger
    return (
        f"error {error:.1e}, ratio {ratio:.2f}, {BYTES[op](arguments, dtype) / kernel / 1e9:.0f} GB/s, "
        f"{kernel * 1e6:.0f} µs (compiled {compiled * 1e6:.0f}, eager {eager * 1e6:.0f}, Liger {theirs})"
    )


def _seconds(op: str, function: Callable[..., Any], sets: tuple[Inputs, ...]) -> float:
    """Of a forward and a backward pass. On a CPU once only: a rehearsal, whose times mean nothing."""
    calls = [lambda made=made: _call(op, function, made) for made in sets]
    return seconds_of(calls) if CUDA else seconds_of(calls, rounds=1, warmup=0)


def _liger(op: str, sets: tuple[Inputs, ...]) -> float | str:
    """Seconds of Liger's kernel, or why there are none."""
    if op not in LIGER:
        return "has none"
    if find_spec("liger_kernel") is None:
        return "not installed"
    try:
        return _seconds(op, LIGER[op], sets)
    except Exception as error:  # noqa: BLE001  somebody else's kernel: its failure costs its own number only
        return f"failed: {_first_line(error)}"


def _liger_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, _now: Tensor, _site: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_layer_norm

    total = residual + F.dropout(x, p)
    return total, liger_layer_norm(total, weight, bias, 1e-5)


def _liger_loss(logits: Tensor, targets: Tensor, _vocab_size: int) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, targets, reduction="sum")


LIGER: dict[str, Callable[..., Any]] = {"dropout_add_layer_norm": _liger_norm, "cross_entropy": _liger_loss}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


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
