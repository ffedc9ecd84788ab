"""The same CUDA C++ on a CPU: ``thread_shim.h`` runs each thread of a block as a thread of the process. For proofs."""

import ctypes
import functools
import platform
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.kernels.compiled import kept

HEADER = Path(__file__).with_suffix(".h")

_one_launch = threading.Lock()  # the header keeps the dimensions of the launch that runs

# What a launch returns, in words.
FAULTS = {
    1: "an address is no multiple of the size of the vector there",
    2: "some threads of a block meet a barrier that others do not",
}

# CUDA code reads memory as another type, against C++'s rules of aliasing. Without the last option numbers are wrong.
OPTIONS = ("-std=c++20", "-O2", "-pthread", "-Wno-unknown-pragmas", "-fno-strict-aliasing")


def cannot_run() -> str | None:
    """Why CUDA C++ cannot run on the CPU here, or None."""
    if shutil.which("g++"):
        return None
    return "on a CPU, g++ (version 11 or later) compiles its CUDA C++, and there is no g++: install it"


def program(source: Path, kernels: Sequence[str]) -> str:
    """The text that is compiled: the shim, the source, and a launcher for each of ``kernels``."""
    return "\n".join([HEADER.read_text(), source.read_text(), *(f"LAUNCHER({name})" for name in kernels), ""])


@functools.cache
def library(source: Path, kernels: tuple[str, ...]) -> ctypes.CDLL:
    """``source`` as a library. It is compiled once and kept.

    Raises:
        UserError: there is no g++, or it refuses the source.
    """
    if reason := cannot_run():
        raise UserError(f"Cannot run {source.name}: {reason}.")
    text = program(source, kernels)
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout

    def build(path: Path) -> None:
        command = ["g++", *OPTIONS, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"g++ cannot compile {source.name} for the CPU: {done.stderr.strip()}")

    return ctypes.CDLL(str(kept([text, *OPTIONS, version, *platform.libc_ver(), platform.machine()], ".so", build)))


def launch(
    source: Path,
    kernels: tuple[str, ...],
    name: str,
    grid: int,
    threads: int,
    arguments: Sequence[Any],
    blocks: Sequence[int] | None = None,
) -> None:
    """Run a kernel of ``source`` on the CPU, and wait for it.

    Args:
        source: the ``.cu`` file.
        kernels: all kernels of the source that are launched.
        name: the one to run.
        grid: number of blocks.
        threads: of each block, a multiple of 32.
        arguments: as ctypes values; pointers as ``c_void_p``.
        blocks: those to run, in this order. None: all.

    Raises:
        UserError: the source cannot be compiled.
        RuntimeError: the kernel does what a GPU could not: one of ``FAULTS``.
    """
    run = getattr(library(source, kernels), f"launch_{name}")
    order = range(grid) if blocks is None else blocks
    addresses = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
    numbers = (ctypes.c_uint * len(order))(*order)
    with _one_launch:
        fault = run(ctypes.c_uint(grid), ctypes.c_uint(threads), addresses, numbers, ctypes.c_longlong(len(order)))
    if fault:
        raise RuntimeError(f"{name} of {source.name}: {FAULTS[fault]}")
