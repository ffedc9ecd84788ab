"""Which ops of a model run as kernels, and why the others do not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from trainer.kernels import adamw, bias_relu, cross_entropy, dropout_add_layer_norm, records
from trainer.kernels.jit import LEAST_ARCHITECTURE, TYPES

OPS: dict[str, ModuleType] = {
    op.__name__.rpartition(".")[2]: op for op in (dropout_add_layer_norm, cross_entropy, bias_relu, adamw)
}

Setting = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class Ops:
    """The functions that a model calls, each the reference or the kernel of its op.

    Attributes:
        ran: by op, ``fused``, or ``reference`` with the reason. config.json shows it.
    """

    dropout_add_layer_norm: Callable[..., Any]
    cross_entropy: Callable[..., Any]
    bias_relu: Callable[..., Any]
    adamw: Callable[..., Any]
    ran: Mapping[str, str]


def choose(
    setting: Setting,
    architecture: int | None = None,
    dtype: torch.dtype = torch.float32,
    file: Path = records.FILE,
) -> Ops:
    """Choose the function of each op.

    Args:
        setting: ``on`` and ``off`` decide for all ops. With ``auto`` an op runs as a kernel where the repository holds
            record of a test on such a GPU, of the files that the op has today.
        architecture: of the GPU, for example 90. None on a CPU.
        dtype: of the activations.
        file: the records.

    Raises:
        ValueError: the file has no records in it.
    """
    ran = {op: _refusal(op, setting, architecture, dtype, file) or "fused" for op in OPS}
    functions = {op: module.fused if ran[op] == "fused" else module.reference for op, module in OPS.items()}
    return Ops(**functions, ran=ran)


def _refusal(op: str, setting: Setting, architecture: int | None, dtype: torch.dtype, file: Path) -> str | None:
    if setting == "on":
        return None
    if setting == "off":
        return "reference: kernels=off"
    if architecture is None:
        return "reference: kernels are for GPUs"
    if architecture < LEAST_ARCHITECTURE:
        return f"reference: kernels need sm_{LEAST_ARCHITECTURE} or newer, and the GPU is sm_{architecture}"
    reason = records.refusal(op, architecture, TYPES[dtype], file)
    return reason and f"reference: {reason}"
