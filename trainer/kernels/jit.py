"""Triton where it is installed. Without it, the files of the ops can still be imported, and their kernels not run.

``triton`` and ``tl`` are the modules, or None. ``jit`` is :func:`triton.jit`, and ``constexpr`` the annotation of
parameters that a kernel knows when it is compiled.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

triton: Any
tl: Any

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
except ImportError:
    triton = tl = None

    def _left_alone(function: Any) -> Any:
        return function

    jit = _left_alone

if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr if tl else object


def cannot_run(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot run on ``tensor``, or None. On the meta device nothing runs, so everything can."""
    if triton is None:
        return "the package triton is not installed"
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU, Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1 before the start"
    return None
