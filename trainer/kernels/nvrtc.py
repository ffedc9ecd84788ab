"""CUDA C++ that is compiled at run time and launched on the current stream. No build step and no extension module.

The compiler is NVRTC, the library that torch for CUDA brings; where it is missing, nvcc. Neither needs a GPU.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.kernels.compiled import kept


@dataclass(frozen=True, slots=True)
class Compiler:
    """A compiler that was found.

    Attributes:
        name: with the version, for example ``NVRTC 13.0``.
        build: compiles a source with options, and writes the cubin to a path.
    """

    name: str
    build: Callable[[Path, list[str], Path], None]


def _library() -> ctypes.CDLL | None:
    """NVRTC: of torch's CUDA packages, which suits the driver that torch runs on, else of a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    toolkits = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [file for package in packages for file in sorted(package.glob("*/lib/libnvrtc.so.*"), reverse=True)]
    found += [file for toolkit in toolkits for file in sorted(toolkit.glob("lib64/libnvrtc.so*"))]
    for file in [*found, Path("libnvrtc.so.13"), Path("libnvrtc.so.12")]:
        try:
            if file.is_absolute():  # NVRTC asks for its other half by name, without the folder
                for half in file.parent.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(half))
            return ctypes.CDLL(str(file))
        except OSError:
            continue
    return None


@functools.cache
def compiler() -> Compiler | None:
    """NVRTC or nvcc, or None."""
    if library := _library():
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return Compiler(f"NVRTC {major.value}.{minor.value}", functools.partial(_with_nvrtc, library))
    in_toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    if nvcc := shutil.which("nvcc") or shutil.which(in_toolkit):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        version = said.partition("release ")[2].partition(",")[0]
        return Compiler(f"nvcc {version}", functools.partial(_with_nvcc, nvcc))
    return None


def cannot_compile() -> str | None:
    """Why CUDA C++ cannot be compiled here, or None."""
    if compiler() is not None:
        return None
    return "there is no compiler for CUDA C++: install the package nvidia-cuda-nvrtc, or a CUDA toolkit (CUDA_HOME)"


def cubin(source: Path, architecture: int) -> Path:
    """The machine code of ``source`` for ``architecture``, for example 90. It is compiled once and kept.

    Raises:
        UserError: there is no compiler, or it refuses the source or the architecture.
    """
    found = compiler()
    if found is None:
        raise UserError(f"Cannot compile {source.name}: {cannot_compile()}.")
    options = ["-std=c++17", f"-arch=sm_{architecture}"]
    return kept([source.read_text(), *options, found.name], ".cubin", lambda path: found.build(source, options, path))


def _with_nvrtc(library: ctypes.CDLL, source: Path, options: list[str], path: Path) -> None:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    program = ctypes.c_void_p()

    def call(function: str, *arguments: Any) -> None:
        if status := getattr(library, function)(*arguments):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(max(1, size.value))
            library.nvrtcGetProgramLog(program, log)
            why = log.value.decode(errors="replace").strip() or library.nvrtcGetErrorString(status).decode()
            raise UserError(f"NVRTC cannot compile {source.name} with {' '.join(options)}: {why}")

    call("nvrtcCreateProgram", ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options)))
        size = ctypes.c_size_t()
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, code)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    path.write_bytes(code.raw)


def _with_nvcc(nvcc: str, source: Path, options: list[str], path: Path) -> None:
    command = [nvcc, "-cubin", *options, "-o", str(path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"nvcc cannot compile {source.name} with {' '.join(options)}: {done.stderr.strip()}")


def _driver(function: str, *arguments: Any) -> None:
    """Call the CUDA driver. Raises RuntimeError with its text."""
    library = ctypes.CDLL("libcuda.so.1")
    if status := getattr(library, function)(*arguments):
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()} ({status})")


@functools.cache
def _kernel(source: Path, name: str, architecture: int, device: int) -> ctypes.c_void_p:
    """A kernel in the context of ``device``, which must be the current one."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _driver("cuModuleLoadData", ctypes.byref(module), cubin(source, architecture).read_bytes())
    _driver("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def launch(source: Path, name: str, grid: int, threads: int, arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a kernel of ``source`` on the current stream of ``device``.

    Args:
        source: the ``.cu`` file.
        name: of the kernel, declared ``extern "C"``.
        grid: number of blocks.
        threads: of each block.
        arguments: as ctypes values; pointers as ``c_void_p``. A 64-bit count travels in memory of the device.
        device: the GPU.

    Raises:
        UserError: the source cannot be compiled.
        RuntimeError: the driver refuses.
    """
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        major, minor = torch.cuda.get_device_capability()
        function = _kernel(source, name, 10 * major + minor, torch.cuda.current_device())
        addresses = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        _driver("cuLaunchKernel", function, grid, 1, 1, threads, 1, 1, 0, stream, addresses, None)
