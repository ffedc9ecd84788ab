"""Tests of Triton kernels on a machine without a GPU. docs/kernels.md shows how they are used.

A test that runs a kernel is marked :func:`interpreted`. It then runs in a child process, where Triton's interpreter is
switched on; a kernel that destroys the heap ends the child, and only that test fails. The whole function runs there, so
it may patch what it likes. Its arguments (parameters, fixtures) are pickled::

    @interpreted
    @pytest.mark.parametrize("width", [100, 129])
    def test_values(width):
        with guarded():  # everything the op allocates has guard elements around it
            total, normed = fused(...)
        assert error(normed, expected) < 3e-6


    @interpreted
    def test_order():
        same_in_any_order(lambda: [fused(...)])


    @interpreted
    def test_offsets():
        logits = sparse((43_000, 50_304), torch.float16)
        logits[-1] = ...  # only pages that are written take memory
        with last_program():  # of each launch, the last program alone runs
            statistics(logits)

In the child, each launch is also searched for races: an address that one program writes and another one reads or writes
fails the test, and so does an atomic operation on floats, whose order on a GPU is left to chance.

What the interpreter cannot tell: a program costs about 50 ms, so a test should launch few; ``tl.dot`` of bf16 is wrong
(triton-lang/triton#11584), and fp32 is cut to bf16, not rounded.
"""

import contextlib
import functools
import importlib
import math
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
SECONDS = 400  # a test in the child takes less, also on a machine that does much else
GUARD = 16_384  # elements before and after; no block of ours is wider
# A NaN of each type, as an integer. The lowest bits may be any.
NAN = {
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
MAP_NORESERVE = 0x4000  # Linux; Python 3.11 has no name for it


# ---- the child process


class Child:
    """A process with Triton's interpreter, which runs functions of one test module."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._requests, theirs = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.kernels.child", module, str(theirs.fileno())],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=REPOSITORY,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def call(self, function: str, args: Any, kwargs: Any) -> None:
        """Run a function of the module. Raises what pytest knows as a failed or a skipped test."""
        try:
            self._requests.send((function, args, kwargs))
            if not self._requests.poll(SECONDS):
                self.close()
                pytest.fail(f"no result after {SECONDS} s", pytrace=False)
            outcome, text = self._requests.recv()
        except (EOFError, OSError):
            status = self._process.wait()
            self.close()
            pytest.fail(f"the process of the kernel died (status {status}); see its stderr", pytrace=False)
        if outcome == "skipped":
            pytest.skip(text)
        elif outcome == "failed":
            pytest.fail(text, pytrace=False)

    def close(self) -> None:
        """End the process."""
        _children.pop(self.module, None)
        self._requests.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_children: dict[str, Child] = {}


def close() -> None:
    """End the child of the module whose tests have ended."""
    for child in list(_children.values()):
        child.close()


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run this test in the child process, the same one for all tests of a file.

    With ``TRITON_INTERPRET=1`` in the environment it runs here instead, where a debugger can follow it.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _watched(test)

    @functools.wraps(test)
    def ask(*args: Any, **kwargs: Any) -> None:
        if test.__module__ not in _children:
            close()
            _children[test.__module__] = Child(test.__module__)
        _children[test.__module__].call(test.__name__, args, kwargs)

    return ask


def serve(module: str, requests: Connection) -> None:
    """The child: run what is asked for, until nobody is there to ask. Does not return."""
    torch.set_num_threads(1)
    names = importlib.import_module(module)
    while True:
        try:
            function, args, kwargs = requests.recv()
        except EOFError:
            os._exit(0)  # without the seconds that torch and Triton take to leave
        try:
            getattr(names, function)(*args, **kwargs)
            outcome = "passed", ""
        except pytest.skip.Exception as skip:
            outcome = "skipped", str(skip)
        except BaseException:  # noqa: BLE001  whatever it is, the test fails with it
            outcome = "failed", traceback.format_exc()
        requests.send(outcome)


def _watched(test: Callable[..., None]) -> Callable[..., None]:
    """What holds for each test in the child: warnings are errors as in the suite, and races are looked for."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings(), _masked_out_is_nan(), _races_found():
            warnings.simplefilter("error")
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category)
            # uint32 of a hash is meant to wrap. numpy says so for scalars, and not for arrays.
            warnings.filterwarnings("ignore", r"overflow encountered in scalar \w+", RuntimeWarning)
            test(*args, **kwargs)

    return run


# ---- what a kernel computed


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number. NaN in either makes it infinite."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} and not {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    return math.inf if math.isnan(difference) else difference / max(expected.double().abs().max().item(), 1e-30)


def bits(tensor: Tensor) -> bytes:
    """Its bytes, which are equal where all bits are, those of NaN and of -0 as well."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


# ---- the order of programs


@contextlib.contextmanager
def programs(order: str, seed: int = 0) -> Iterator[None]:
    """Run the programs of each launch ``forward``, ``reversed``, ``shuffled`` by ``seed``, or the ``last`` one alone.

    Of a grid with several dimensions, each dimension is ordered by itself.
    """
    from triton.runtime import interpreter

    draw = random.Random(seed)

    def ordered(*args: int) -> Any:
        indices = range(*args)
        if (
            sys._getframe(1).f_code.co_qualname != "GridExecutor.__call__"
        ):  # a loop of the kernel, or of the interpreter
            return indices
        if order == "shuffled":
            return draw.sample(indices, len(indices))
        return {"forward": indices, "reversed": indices[::-1], "last": indices[-1:]}[order]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "range", ordered, raising=False)
        yield


def same_in_any_order(run: Callable[[], Sequence[Tensor]]) -> None:
    """Fail if a bit of the results of ``run`` depends on the order of programs. ``run`` must not change its inputs."""
    results: dict[str, list[bytes]] = {}
    for order, seed in (("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)):
        with programs(order, seed):
            results[f"{order} {seed}"] = [bits(tensor) for tensor in run()]
    first = results["forward 0"]
    differing = [order for order, result in results.items() if result != first]
    assert not differing, f"other results than in the order forward: {differing}"


@contextlib.contextmanager
def _races_found() -> Iterator[None]:
    """Fail where programs of one launch share an address that one of them writes, and at atomics on floats."""
    from triton.runtime import interpreter

    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    reads: list[tuple[Any, Any]] = []
    writes: list[tuple[Any, Any]] = []

    def note(where: list[tuple[Any, Any]], pointers: Any, mask: Any) -> None:
        x, y, z = interpreter.interpreter_builder.grid_idx
        addresses = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)])
        where.append((addresses, np.full(addresses.shape, (x << 42) + (y << 21) + z)))

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(reads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def noted_atomic(self: Any, operation: Any, pointers: Any, value: Any, *rest: Any) -> Any:
        assert value.data.dtype.kind != "f", "an atomic operation on floats: its order is left to chance"
        return atomic(self, operation, pointers, value, *rest)

    def checked_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        reads.clear()
        writes.clear()
        launch(self, *args, **kwargs)
        if not writes:
            return
        address, program = (np.concatenate(parts) for parts in zip(*writes, strict=True))
        order = np.lexsort((program, address))
        address, program = address[order], program[order]
        twice = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        assert not twice.any(), f"{self.fn.__name__}: {twice.sum()} addresses are written by more than one program"
        if reads:
            read, reader = (np.concatenate(parts) for parts in zip(*reads, strict=True))
            place = np.searchsorted(address, read).clip(max=len(address) - 1)
            shared = (address[place] == read) & (program[place] != reader)
            assert not shared.any(), f"{self.fn.__name__}: {shared.sum()} reads of what another program writes"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", noted_load)
        patch.setattr(builder, "create_masked_store", noted_store)
        patch.setattr(builder, "create_atomic_rmw", noted_atomic)
        patch.setattr(interpreter.GridExecutor, "__call__", checked_launch)
        yield


# ---- memory


@contextlib.contextmanager
def _masked_out_is_nan() -> Iterator[None]:
    """Let a load without ``other`` give NaN (integers: a pattern) where its mask is false.

    On a GPU such an element holds what was in the register before. The interpreter would give zero.
    """
    from triton.language.semantic import TritonSemantic

    load = TritonSemantic._load_legacy

    def filled(self: Any, pointer: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if mask is not None and other is None:
            floats = pointer.type.scalar.element_ty.is_floating()
            other = self.to_tensor(math.nan if floats else 85)
        return load(self, pointer, mask, other, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonSemantic, "_load_legacy", filled)
        yield


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[Tensor], Tensor]]:
    """Give each tensor that is allocated inside guard elements on both sides, which must not be changed or loaded.

    It sees ``torch.empty``, ``empty_like``, ``zeros``, ``zeros_like`` and the methods ``new_empty`` and ``new_zeros``.
    Memory that is not set to zero holds NaN (integers: a pattern), as the guards do: what is read too far, or is never
    written, shows in the results.

    Yields:
        A function that copies a tensor into guarded memory: for inputs, which may also be written in place.
    """
    buffers: list[tuple[Tensor, int, int]] = []

    def place(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
        size = math.prod(shape)
        # Each buffer has a NaN of its own: one that was read beyond an input is another than that of the output.
        mark = NAN[dtype] + 1 + len(buffers) % 60 if dtype in NAN else 85
        buffer = _empty(size + 2 * GUARD, dtype=dtype)
        whole = buffer.view(INTEGERS[dtype.itemsize]) if dtype in NAN else buffer
        buffers.append((whole.fill_(mark), mark, size))
        if zero:
            buffer[GUARD : GUARD + size].zero_()
        # Not a view: autograd treats views in its own way.
        return _empty(0, dtype=dtype).set_(buffer.untyped_storage(), GUARD, tuple(shape))

    def copied(tensor: Tensor) -> Tensor:
        return place(tensor.shape, tensor.dtype).copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    with _allocations(place), _guards_unread(buffers):
        yield copied
    for whole, mark, size in buffers:
        for side, guard in (("before", whole[:GUARD]), ("after", whole[GUARD + size :])):
            changed = (guard != mark).sum().item()
            assert not changed, f"{changed} elements {side} a tensor of {size} {whole.dtype} were overwritten"


@contextlib.contextmanager
def _guards_unread(buffers: list[tuple[Tensor, int, int]]) -> Iterator[None]:
    """Fail where a load reads a guard. A value that is then not used would show nowhere else."""
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def checked(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        read = np.atleast_1d(pointers.data)[np.atleast_1d(np.broadcast_to(mask.data, pointers.data.shape)).astype(bool)]
        for whole, _, size in buffers:
            start, guard = whole.data_ptr(), GUARD * whole.itemsize
            inside = (read >= start) & (read < start + len(whole) * whole.itemsize)
            own = (read >= start + guard) & (read < start + guard + size * whole.itemsize)
            assert not (inside & ~own).any(), f"{(inside & ~own).sum()} reads beyond a tensor of {size} {whole.dtype}"
        return load(self, pointers, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked)
        yield


def sparse(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros, of any size. Only pages that are written take memory."""
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(size, 1) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(tuple(shape))


@contextlib.contextmanager
def last_program() -> Iterator[None]:
    """Run the last program of each launch alone, on tensors that may come from :func:`sparse`.

    What is allocated inside (by the functions that :func:`guarded` lists) is sparse as well. So a kernel is tried on
    more than 2³¹ elements, where an offset of 32 bits is negative, and the memory of one program is used.
    """
    from triton.runtime import interpreter

    def place(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
        return sparse(shape, dtype)

    with pytest.MonkeyPatch.context() as patch, programs("last"), _allocations(place):
        # It copies each storage over itself, and so would touch all of it.
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        yield


_empty = torch.empty


@contextlib.contextmanager
def _allocations(place: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``place(shape, dtype, zero)`` allocate CPU tensors."""

    def allocated(sizes: Sequence[Any], dtype: torch.dtype, zero: bool) -> Tensor:
        shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes
        return place(shape, dtype, zero) if math.prod(shape) else _empty(shape, dtype=dtype)

    def plain(zero: bool) -> Callable[..., Tensor]:
        def allocate(*sizes: Any, dtype: torch.dtype | None = None, size: Any = None, **_: Any) -> Tensor:
            return allocated(sizes if size is None else (size,), dtype or torch.get_default_dtype(), zero)

        return allocate

    def like(zero: bool) -> Callable[..., Tensor]:
        def allocate(tensor: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return allocated((tensor.shape,), dtype or tensor.dtype, zero)

        return allocate

    def new(zero: bool) -> Callable[..., Tensor]:
        def allocate(self: Tensor, *sizes: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return allocated(sizes, dtype or self.dtype, zero)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        for name, zero in (("empty", False), ("zeros", True)):
            patch.setattr(torch, name, plain(zero))
            patch.setattr(torch, f"{name}_like", like(zero))
            patch.setattr(Tensor, f"new_{name}", new(zero))
        yield
