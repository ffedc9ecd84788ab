"""The op adamw: its CUDA C++ runs in the thread shim on a CPU, and on a GPU where there is one (marker gpu)."""

import contextlib
import ctypes
import dataclasses
import itertools
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.harness import REPOSITORY, bits, error, guarded
from trainer.errors import UserError
from trainer.kernels import adamw, nvrtc, thread_shim
from trainer.kernels.adamw import fused, reference, supported

SIZES = (0, 1, 3, 4, 7, 1023, 1025, 40_000)  # the last has chunks of 16,384 elements: two whole ones and a part
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.5}
CPU = pytest.param("cpu", marks=pytest.mark.skipif(thread_shim.cannot_run() is not None, reason="no g++"))
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_cpu = pytest.mark.skipif(thread_shim.cannot_run() is not None, reason="no g++")


@dataclasses.dataclass
class Tensors:
    """The five lists of the op."""

    gradients: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor] | None

    def lists(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def written(self) -> list[Tensor]:
        return [*self.masters, *self.exp_avgs, *self.exp_avg_sqs, *(self.copies or [])]

    def map(self, change: Any) -> "Tensors":
        return Tensors(*(None if tensors is None else [change(t) for t in tensors] for tensors in self.lists()))


def draw(
    sizes: Sequence[int] = SIZES, gradient: torch.dtype = torch.float32, copy: torch.dtype | None = None, seed: int = 0
) -> Tensors:
    """Gradients of 1e-3, weights of 0.02, moments that fit. Each tensor's numbers are larger than the one's before."""
    random = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> list[Tensor]:
        return [torch.randn(size, generator=random) * scale * (i + 1) for i, size in enumerate(sizes)]

    seconds = [tensor.square() for tensor in normal(1e-3)]
    copies = None if copy is None else [torch.full((size,), math.nan, dtype=copy) for size in sizes]
    return Tensors([g.to(gradient) for g in normal(1e-3)], normal(0.02), normal(3e-4), seconds, copies)


def in_fp64(before: Tensors, step: int, factor: float, lr: float, betas: Any, eps: float, weight_decay: float) -> Any:
    """AdamW by its paper: masters and moments."""
    masters, means, seconds = [], [], []
    for gradient, master, mean, second in zip(*(map(Tensor.double, t) for t in before.lists()[:4]), strict=True):
        scaled = gradient * factor
        means.append(betas[0] * mean + (1 - betas[0]) * scaled)
        seconds.append(betas[1] * second + (1 - betas[1]) * scaled * scaled)
        decayed = master * (1 - lr * weight_decay)
        corrected = means[-1] / (1 - betas[0] ** step), seconds[-1] / (1 - betas[1] ** step)
        masters.append(decayed - lr * corrected[0] / (corrected[1].sqrt() + eps))
    return masters, means, seconds


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(error(one.cpu(), other) for one, other in zip(found, expected, strict=True))


def check(after: Tensors, squares: Tensor, before: Tensors, step: int, factor: float, **changes: Any) -> None:
    masters, means, seconds = in_fp64(before, step, factor, **{**SETTINGS, **changes})
    assert worst(after.masters, masters) < 1e-6
    assert worst(after.exp_avgs, means) < 1e-6
    assert worst(after.exp_avg_sqs, seconds) < 1e-6
    assert worst(after.gradients, before.gradients) == 0
    added = [a.cpu().double() - b.double() for a, b in zip(after.masters, before.masters, strict=True)]
    assert squares.tolist() == pytest.approx([a.square().sum().item() for a in added], rel=1e-6)
    if after.copies is not None:
        assert all(map(torch.equal, after.copies, [m.to(after.copies[0].dtype) for m in after.masters]))


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("gradient", "copy"), adamw.KERNELS)
def test_agrees_with_fp64(
    device: str, gradient: torch.dtype, copy: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copy is None:  # several warps, whose sums are added up
        monkeypatch.setitem(adamw.THREADS, "cpu", 96)
    before = draw(gradient=gradient, copy=copy)
    for step, factor in ((1, 0.37), (143_000, 2.5)):
        with guarded() as copied:
            after = before.map(lambda t: copied(t) if device == "cpu" else t.to(device))
            scale = torch.tensor([factor], device=device)
            squares = fused(*after.lists(), **SETTINGS, step=step, factor=scale)
            check(after, squares, before, step, factor)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("misaligned", ["gradients", "masters", "exp_avgs", "exp_avg_sqs", "copies", "all"])
@pytest.mark.parametrize("by", ["an element", "8 bytes"])
def test_tensors_that_begin_between_16_bytes(
    device: str, misaligned: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adamw.THREADS, "cpu", 64)  # more than a warp
    before = draw((1, 5, 1026), copy=torch.bfloat16)
    factor = torch.tensor(0.5, device=device)
    with guarded() as copied:
        lists = []
        for field in dataclasses.fields(before):
            tensors = getattr(before, field.name)
            skipped = 1 if by == "an element" else 8 // tensors[0].itemsize
            skipped = skipped if misaligned in (field.name, "all") else 0
            padded = [torch.cat([t.new_full((skipped,), 77.0), t]) for t in tensors]
            lists.append([copied(t) if device == "cpu" else t.to(device) for t in padded])
        narrow = zip(lists, before.lists(), strict=True)
        after = Tensors(*([t[len(t) - len(b) :] for t, b in zip(*pair, strict=True)] for pair in narrow))
        squares = fused(*after.lists(), **SETTINGS, step=2, factor=factor)
        check(after, squares, before, 2, 0.5)
    for whole, part in zip(itertools.chain(*lists), itertools.chain(*after.lists()), strict=True):
        assert whole[: len(whole) - len(part)].eq(77.0).all()


@on_cpu
def test_a_factor_of_zero_is_an_update_without_gradient() -> None:
    before = draw((1025,))
    after = before.map(Tensor.clone)
    check(after, fused(*after.lists(), **SETTINGS, step=3, factor=torch.tensor(0.0)), before, 3, 0.0)


@on_cpu
def test_the_first_update_from_moments_of_zero() -> None:
    """1 − 0.999 is exact to 5e-5 in fp32: the host computes it."""
    before = draw((1025,))
    before.exp_avgs, before.exp_avg_sqs = ([torch.zeros(1025)] for _ in range(2))
    after = before.map(Tensor.clone)
    squares = fused(*after.lists(), **{**SETTINGS, "betas": (0.99, 0.999)}, step=1, factor=torch.tensor(1.0))
    check(after, squares, before, 1, 1.0, betas=(0.99, 0.999))


@on_cpu
@pytest.mark.parametrize("first", [1, 143_000])
def test_agrees_with_torch_over_several_updates(first: int) -> None:
    ours = draw((3, 1025, 20_000))
    theirs = [torch.nn.Parameter(master.clone()) for master in ours.masters]
    optimizer = torch.optim.AdamW(theirs, **SETTINGS, fused=True)
    for parameter, mean, second in zip(theirs, ours.exp_avgs, ours.exp_avg_sqs, strict=True):
        state = {"exp_avg": mean.clone(), "exp_avg_sq": second.clone(), "step": torch.tensor(first - 1.0)}
        optimizer.state[parameter] = state
    for step in range(first, first + 5):
        gradients = draw((3, 1025, 20_000), seed=step).gradients
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient * 0.25
        optimizer.step()
        fused(gradients, *ours.lists()[1:], **SETTINGS, step=step, factor=torch.tensor(0.25))
    assert worst(ours.masters, [parameter.detach() for parameter in theirs]) < 1e-6
    assert worst(ours.exp_avgs, [optimizer.state[parameter]["exp_avg"] for parameter in theirs]) < 1e-6
    assert worst(ours.exp_avg_sqs, [optimizer.state[parameter]["exp_avg_sq"] for parameter in theirs]) < 1e-6


def test_the_reference_agrees_with_fp64() -> None:
    before = draw(copy=torch.float16)
    after = before.map(Tensor.clone)
    check(after, reference(*after.lists(), **SETTINGS, step=3, factor=torch.tensor(0.37)), before, 3, 0.37)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("function", [fused, reference])
@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_an_overflow_changes_nothing(device: str, function: Any, factor: float) -> None:
    before = draw((3, 1025), torch.float16, torch.float16).map(lambda t: t.to(device))
    after = before.map(Tensor.clone)
    squares = function(*after.lists(), **SETTINGS, step=3, factor=torch.tensor(factor, device=device))
    assert [bits(t.cpu()) for t in after.written()] == [bits(t.cpu()) for t in before.written()]
    assert squares.tolist() == [0, 0]


@on_cpu
@pytest.mark.parametrize("function", [fused, reference])
def test_no_tensors_and_empty_tensors(function: Any) -> None:
    factor = torch.tensor(1.0)
    assert function([], [], [], [], None, **SETTINGS, step=1, factor=factor).shape == (0,)
    empty = draw((0, 0))
    assert function(*empty.lists(), **SETTINGS, step=1, factor=factor).tolist() == [0, 0]


def rounded(values: Tensor, copy: torch.dtype) -> Tensor:
    """The copies of masters that the update does not change."""
    masters, zeros = values.clone(), [torch.zeros_like(values) for _ in range(3)]
    copies = torch.zeros_like(values, dtype=copy)
    numbers = {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.0}
    fused(zeros[:1], [masters], zeros[1:2], zeros[2:], [copies], **numbers, step=1, factor=torch.ones(1))
    return copies


@on_cpu
@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16])
def test_copies_are_rounded_as_torch_does(copy: torch.dtype) -> None:
    """All 65,536 numbers of the type, what lies in the middle of two, and the nearest on both sides of it."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(copy).float()
    exact = exact[exact.isfinite()].sort().values
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    largest = torch.tensor([torch.finfo(torch.float32).max, 65_504.0, 65_519.99, 65_520.0, 1e-45])
    values = torch.cat([exact, middle, *(torch.nextafter(middle, torch.tensor(s * math.inf)) for s in (1, -1))])
    values = torch.cat([values, largest, -largest])
    values = values[values != 0]  # the update makes zero of -0
    assert bits(rounded(values, copy)) == bits(values.to(copy))


@on_cpu
@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16])
def test_what_is_not_a_number_stays_so_in_copies(copy: torch.dtype) -> None:
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF, 0x7F80FFFF], dtype=torch.int32)
    assert rounded(patterns.view(torch.float32), copy).isnan().all()


@on_cpu
@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16])
def test_all_gradients_of_16_bits_are_read_right(gradient: torch.dtype) -> None:
    gradients = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(gradient)
    zeros = [torch.zeros(2**16) for _ in range(3)]
    numbers = {"lr": 0.0, "betas": (0.0, 0.95), "eps": 1.0, "weight_decay": 0.0}  # the first moment is the gradient
    fused([gradients], zeros[:1], zeros[1:2], zeros[2:], None, **numbers, step=1, factor=torch.ones(1))
    assert torch.equal(zeros[1].nan_to_num(7.0, 8.0, 9.0), gradients.float().nan_to_num(7.0, 8.0, 9.0))


@on_cpu
@pytest.mark.parametrize("threads", [32, 256])
def test_the_order_of_blocks_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw.THREADS, "cpu", threads)
    before = draw((1, 0, 100, 2603), copy=torch.bfloat16)  # the last has more blocks than a warp has threads
    numbers = adamw.Numbers(0.001, 0.1, 0.95, 0.05, 0.02, 1.1, 1e-8)
    results = []
    for seed in (None, 1, 2):
        after = before.map(Tensor.clone)
        update = adamw.Update(after.lists(), numbers, torch.tensor(0.5), chunk=64)
        blocks = list(range(update.blocks))
        update.run_on_cpu(random.Random(seed).sample(blocks, len(blocks)) if seed else blocks)
        results.append([bits(t) for t in (*after.written(), update.squares)])
        added = zip(after.masters, before.masters, strict=True)
        expected = [(a.double() - b.double()).square().sum().item() for a, b in added]
        assert update.squares.tolist() == pytest.approx(expected, rel=1e-6)
    assert results[1:] == results[:1] * 2


@on_cpu
def test_two_runs_give_the_same_bits() -> None:
    before = draw(copy=torch.float16)
    results = []
    for _ in range(2):
        after = before.map(Tensor.clone)
        squares = fused(*after.lists(), **SETTINGS, step=9, factor=torch.tensor(0.37))
        results.append([bits(t) for t in (*after.written(), squares)])
    assert results[0] == results[1]


BOTH_ENDS = """
import torch
from tests.kernels.harness import sparse
from tests.kernels.test_adamw import Tensors, check
from trainer.errors import UserError
from trainer.kernels import adamw

sizes = (5, 2**31 + 11, 3)
masters, means, seconds, gradients = ([sparse((n,), torch.float32) for n in sizes] for _ in range(4))
tensors = Tensors(gradients, masters, means, seconds, [sparse((n,), torch.bfloat16) for n in sizes])
def ends():  # of the long tensor, six elements; of the others none
    return tensors.map(lambda t: torch.cat([t[:3], t[-3:]]) if len(t) > 5 else t[:0])

for ours, scale in ((gradients, 1e-3), (masters, 0.1), (means, 1e-4)):
    ours[1][:3] = torch.tensor([1.0, -2.0, 3.0]) * scale
    ours[1][-3:] = torch.tensor([4.0, -5.0, -6.0]) * scale
before = ends()
numbers = adamw.Numbers(0.01, 1 - 0.9, 0.95, 1 - 0.95, 0.02 / (1 - 0.9**3), (1 - 0.95**3) ** -0.5, 1e-8)
update = adamw.Update(tensors.lists(), numbers, torch.tensor(0.5))
assert update.blocks == 131_075, update.blocks
update.partial_sums.zero_()
update.run_on_cpu([1, update.blocks - 2])
check(ends(), update.squares, before, 3, 0.5)
"""


def in_child(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"


@on_cpu
def test_the_ends_of_more_than_two_to_the_31_elements() -> None:
    """Two blocks, on buffers of which only their pages are there: an offset of 32 bits would end the process."""
    in_child(BOTH_ENDS)


# ---- races

RACES = Path(__file__).with_name("adamw_races.cpp")


def races(tmp_path: Path, source: str) -> str:
    """What ThreadSanitizer says of an update of several tensors, in blocks of two warps."""
    can = subprocess.run(["setarch", "-R", "true"], capture_output=True) if shutil.which("setarch") else None
    if can is None or can.returncode:
        pytest.skip("ThreadSanitizer needs setarch -R, and it does not work here")
    program = tmp_path / "races.cpp"
    program.write_text(thread_shim.HEADER.read_text() + source + RACES.read_text())
    command = [
        "g++",
        *thread_shim.OPTIONS,
        "-O1",
        "-g",
        "-fsanitize=thread",
        str(program),
        "-o",
        str(tmp_path / "races"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("g++ has no ThreadSanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(["setarch", "-R", str(tmp_path / "races")], capture_output=True, text=True)
    assert "update of 3 tensors" in done.stdout, done.stdout + done.stderr
    return done.stderr


@on_cpu
def test_there_is_no_race(tmp_path: Path) -> None:
    assert races(tmp_path, adamw.SOURCE.read_text()) == ""


@on_cpu
def test_a_missing_barrier_is_named(tmp_path: Path) -> None:
    source = adamw.SOURCE.read_text()
    assert source.count("__syncthreads();") == 1
    said = races(tmp_path, source.replace("__syncthreads();", ""))
    assert "data race" in said
    assert "block_sum" in said


@on_cpu
def test_a_barrier_that_some_threads_do_not_meet_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "branch.cu"
    source.write_text('extern "C" __global__ void branch() { if (threadIdx.x % 32 == 0) __syncthreads(); }')
    with pytest.raises(RuntimeError, match=r"branch of branch\.cu: some threads of a block meet a barrier"):
        thread_shim.launch(source, ("branch",), "branch", 3, 64, ())


# ---- the compilers


@pytest.fixture
def choose_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile with NVRTC or with nvcc, and skip the test where it is not installed."""
    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "cache"))
    nvrtc.compiler.cache_clear()

    def choose(name: str) -> None:
        if name == "nvcc":
            monkeypatch.setattr(nvrtc, "_library", lambda: None)
        found = nvrtc.compiler()
        if found is None or not found.name.startswith(name):
            pytest.skip(f"{name} is not installed; {nvrtc.cannot_compile() or 'another compiler of CUDA C++ is'}")

    yield choose
    nvrtc.compiler.cache_clear()


@pytest.mark.parametrize(("compiler", "architecture"), [("NVRTC", 80), ("NVRTC", 90), ("NVRTC", 100), ("nvcc", 90)])
def test_machine_code_has_16_byte_accesses_and_no_spill(compiler: str, architecture: int, choose_compiler: Any) -> None:
    choose_compiler(compiler)
    cubin = nvrtc.cubin(adamw.SOURCE, architecture)
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True)
    kernels = dict(re.findall(r"Function (\w+):\n\s*(.*)", usage.stdout))
    assert kernels.keys() == set(adamw.NAMES), usage
    assert all("STACK:0" in used and "LOCAL:0" in used for used in kernels.values()), kernels
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    assert not re.search(r"\b(LDL|STL)", code)
    for part in re.split(r"\.section\s+\.text\.", code)[1:]:
        name = part.split(",")[0]
        if name != "adamw_squares":
            wide = len(re.findall(r"\bLDG\S*\.128\b", part)), len(re.findall(r"\bSTG\S*\.128\b", part))
            pieces = 1 if name == "adamw_fp32" else 2  # of each fp32 array: with 16-bit types a thread has 8 elements
            gradient = pieces if name.startswith("adamw_fp32") else 1
            assert wide == (gradient + 3 * pieces, 3 * pieces + (name.count("_") == 2)), name


def test_machine_code_is_kept_by_its_content(
    choose_compiler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_compiler("")  # any
    source = tmp_path / "small.cu"
    source.write_text('extern "C" __global__ void one(float* x) { *x = 1; }')
    first = nvrtc.cubin(source, 90)
    made = first.stat().st_mtime_ns
    assert nvrtc.cubin(source, 90) == first
    assert first.stat().st_mtime_ns == made
    assert nvrtc.cubin(source, 80) != first
    source.write_text(source.read_text().replace("1;", "2;"))
    assert nvrtc.cubin(source, 90) != first
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 3
    source.write_text("a mistake")
    with pytest.raises(UserError, match=r"cannot compile small\.cu with -std=c\+\+17 -arch=sm_90: .*small\.cu\(1\)"):
        nvrtc.cubin(source, 90)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPT_OPS_CACHE", str(tmp_path / "file"))
    source.write_text('extern "C" __global__ void one(float* x) { *x = 3; }')
    with pytest.raises(UserError, match="Set OPT_OPS_CACHE to a folder that this user can write"):
        nvrtc.cubin(source, 90)


@on_cpu
def test_a_gpu_gets_the_arguments_that_the_shim_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is replaced by one that runs the launch in the shim. It stands for a GPU where there is none."""
    launched = []

    def driver(function: str, *arguments: Any) -> None:
        if function == "cuModuleGetFunction":
            arguments[0]._obj.value = adamw.NAMES.index(arguments[2].decode()) + 1
        elif function == "cuLaunchKernel":
            kernel, grid, _, _, threads, _, _, _, _, addresses, extra = arguments
            name = adamw.NAMES[kernel.value - 1]
            launched.append((name, grid, threads, extra))
            run = getattr(thread_shim.library(adamw.SOURCE, adamw.NAMES), f"launch_{name}")
            order = (ctypes.c_uint * grid)(*range(grid))
            run(ctypes.c_uint(grid), ctypes.c_uint(threads), addresses, order, ctypes.c_longlong(grid))

    nvrtc._kernel.cache_clear()
    monkeypatch.setattr(nvrtc, "_driver", driver)
    monkeypatch.setattr(nvrtc, "cubin", lambda source, architecture: adamw.SOURCE)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setitem(adamw.THREADS, "cpu", 64)
    monkeypatch.setattr(
        thread_shim,
        "launch",
        lambda source, kernels, name, grid, threads, arguments, blocks=None: nvrtc.launch(
            source, name, grid, threads, arguments, torch.device("cpu")
        ),
    )
    before = draw((3, 0, 17_000), copy=torch.float16)
    after = before.map(Tensor.clone)
    squares = fused(*after.lists(), **SETTINGS, step=4, factor=torch.tensor(0.5))
    check(after, squares, before, 4, 0.5)
    assert launched == [("adamw_fp32_fp16", 3, 64, None), ("adamw_squares", 3, 64, None)]
    nvrtc._kernel.cache_clear()


# ---- where it cannot run


def reason(tensors: Tensors, **changes: Any) -> str | None:
    return supported(*tensors.lists(), **{**SETTINGS, "step": 1, "factor": torch.tensor(1.0), **changes})


@on_cpu
def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    good = draw((4, 6))
    assert reason(good) is None
    assert reason(good, step=0) == "updates are counted from 1, and step is 0"
    assert reason(good, factor=torch.ones(2)) == "factor must be one fp32 number, not 2 of torch.float32"
    double = dataclasses.replace(good, masters=[t.double() for t in good.masters])
    assert reason(double) == "masters must be fp32, not float64"
    with pytest.raises(NotImplementedError, match="masters must be fp32, not float64"):
        fused(*double.lists(), **SETTINGS, step=1, factor=torch.tensor(1.0))
    mixed = dataclasses.replace(good, gradients=[good.gradients[0], good.gradients[1].half()])
    assert reason(mixed) == "there is no kernel for gradients in float16 and float32 and copies in none"
    short = dataclasses.replace(good, exp_avgs=good.exp_avgs[:1])
    assert reason(short) == "there are 2 masters and 1 exp_avgs"
    longer = dataclasses.replace(good, exp_avgs=[good.exp_avgs[0], torch.zeros(7)])
    assert reason(longer) == "exp_avgs[1] has 7 elements and its master 6"
    strided = dataclasses.replace(good, gradients=[torch.zeros(8)[::2], good.gradients[1]])
    assert reason(strided) == "gradients[0] is not contiguous"
    assert reason(good.map(lambda t: t.to("meta")), factor=torch.empty(1, device="meta")) is None
    assert reason(good, factor=torch.empty(1, device="meta")) == "gradients[0] is on cpu and factor on meta"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no g++: install it" in str(reason(good))


def test_it_says_why_a_gpu_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert adamw.cannot_run(torch.device("cuda")) == "the GPU is sm_70, and the kernel needs sm_75 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvrtc, "compiler", lambda: None)
    assert "install the package nvidia-cuda-nvrtc" in str(adamw.cannot_run(torch.device("cuda")))
    assert adamw.cannot_run(torch.device("xpu")) == "the kernel is for CUDA and CPU, not for xpu"


# ---- one operation


@on_cpu
def test_a_profiler_sees_one_operation() -> None:
    tensors = draw((4, 6))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(*tensors.lists(), **SETTINGS, step=1, factor=torch.tensor(1.0))
    assert [event.count for event in profile.key_averages() if event.key == "opt_ops::adamw"] == [1]


@on_cpu
@pytest.mark.parametrize("copy", [None, torch.bfloat16])
def test_the_operation_declares_what_it_writes(copy: torch.dtype | None) -> None:
    lists = draw((4, 6), copy=copy).lists()
    arguments = (*lists[:4], lists[4] or [], 0.01, 0.9, 0.95, 1e-8, 0.1, 3, torch.tensor(0.5))
    torch.library.opcheck(adamw._adamw, arguments, test_utils=("test_schema", "test_faketensor"))


def test_nothing_runs_on_the_meta_device() -> None:
    tensors = draw((4, 6), copy=torch.float16).map(lambda t: t.to("meta"))
    squares = fused(*tensors.lists(), **SETTINGS, step=1, factor=torch.empty(1, device="meta"))
    assert (squares.shape, squares.dtype, squares.device.type) == ((2,), torch.float32, "meta")


def test_an_import_needs_no_compiler() -> None:
    in_child(
        "import os; os.environ['PATH'] = ''; import trainer.kernels.adamw, sys; assert 'triton' not in sys.modules"
    )
