"""The programs that serve a checkpoint, and whether they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from opt_ops.config import Serve
from opt_ops.errors import UsageError

_MODULES = ("transformers", "torch", "accelerate", "fastapi", "uvicorn", "openai")  # that `transformers serve` imports
_PROBE = "import importlib.util, sys; print(*(each for each in sys.argv[1:] if not importlib.util.find_spec(each)))"
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM 0.32: v1/attention/backends/cpu_attn.py
_PROBE_SECONDS = 60.0  # a network file system may need long to find packages


def engine_program(kind: str, serve: Serve) -> str:
    """The program of vLLM, or the Python that has transformers.

    Args:
        kind: `vllm` or `transformers`.
        serve: the table of the configuration.

    Raises:
        UsageError: it is not there, or lacks a package. The hint installs it.
    """
    if kind == "vllm":
        if serve.vllm and (found := shutil.which(serve.vllm)):
            return str(Path(found).absolute())
        named = f"[serve] vllm = {serve.vllm}: there is no such program"
        why = named if serve.vllm else "[serve] vllm names no program"
        hint = "python -m venv .venv-vllm; .venv-vllm/bin/pip install vllm; then set [serve] vllm = "
        raise UsageError(why, f'{hint}".venv-vllm/bin/vllm"')
    try:
        lacking = _missing(serve.python)
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"[serve] python = {serve.python}: {error}", "make serve-env, or correct that key") from error
    if lacking:
        raise UsageError(
            f"{', '.join(lacking)}: not installed for {serve.python}", f"{serve.python} -m pip install 'opt-ops[serve]'"
        )
    return str(Path(shutil.which(serve.python) or serve.python).absolute())


def require_head_size(vllm: str, size: int) -> None:
    """Check that vLLM's build for CPUs takes attention heads of this size: it finds out after minutes.

    On GPUs it takes all that are a multiple of 8, up to 256. Behind a script, nobody knows which build it is.

    Args:
        vllm: the program.
        size: channels of a head.

    Raises:
        UsageError: it does not.
    """
    packages = Path(vllm).resolve().parent.parent.glob("lib/python*/site-packages/vllm*cpu*.dist-info")
    if any(packages) and size not in _CPU_HEADS:
        known = ", ".join(map(str, _CPU_HEADS))
        why = f"the model's head size {size} is none that vLLM takes on a CPU: {known}"
        raise UsageError(why, "--engine transformers")


def _missing(python: str) -> list[str]:
    """The packages of the engine transformers that this Python lacks."""
    words = [python, "-c", _PROBE, *_MODULES]
    done = subprocess.run(words, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True)
    return done.stdout.split()
