"""Triton where it is installed. Without it, the files of the ops can still be imported, and their kernels not run.

``triton`` and ``tl`` are the modules, or None. A kernel is a function with the decorator :func:`jit`. Its parameters
that are known when it is compiled have the type ``constexpr``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

triton: Any
tl: Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr if tl else object

# Triton's names of the types that our kernels take. A pointer is a name with a star before it.
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# The oldest GPUs on which kernels run. On sm_70 (V100) Triton's code has 10 kB of stack, and nvcc 13 does not know it.
LEAST_ARCHITECTURE = 75


def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """:func:`triton.jit`, or the function itself where there is no Triton.

    Triton compiles a kernel again for integers that are 1 or divisible by 16. ``do_not_specialize`` names the
    parameters for which it shall not: those that differ from call to call.
    """
    if function is None:
        return lambda it: jit(it, do_not_specialize=do_not_specialize)
    return function if triton is None else triton.jit(function, do_not_specialize=list(do_not_specialize))


def cannot_run(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot run on ``tensor``, or None. On the meta device nothing runs, so everything can."""
    if triton is None:
        return "the package triton is not installed"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU, Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1 before the start"
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if 10 * major + minor < LEAST_ARCHITECTURE:
            return f"the GPU is sm_{major}{minor}, and kernels need sm_{LEAST_ARCHITECTURE} or newer"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """A kernel with all that its machine code depends on. Each op lists its own: ``compilations(…)``.

    ``python -m trainer.kernels check`` compiles them without a GPU. They must be what the op's launches ask for, so the
    op makes both from the same functions.

    Attributes:
        op: name of the op.
        kernel: name of the kernel within the op, for example ``backward``.
        function: what :func:`jit` made of it.
        signature: by parameter, in their order, its type: ``*bf16``, ``i32``, ``constexpr``.
        constexprs: the values of parameters that are ``constexpr``.
        divisible: parameters whose value is divisible by 16, pointers included (an address that torch allocates is).
            Loads are 128 bits wide only where this follows.
        num_warps: warps of a program.
        shape: the sizes that it is for: ``hidden`` or ``columns``.
        dtype: of the activations, as in :data:`TYPES`.
    """

    op: str
    kernel: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    shape: Mapping[str, int]
    dtype: str
