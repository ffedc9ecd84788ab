"""Every kernel for every shape of the published recipes, compiled for GPUs that need not be here."""

import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from trainer import recipes
from trainer.kernels import adamw, bias_relu, cross_entropy, dropout_add_layer_norm, jit, nvrtc
from trainer.kernels import compile as machine_code
from trainer.kernels.compile import MachineCode
from trainer.kernels.jit import Compilation

_CUDA_TYPES = {**jit.TYPES, None: None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One kernel for one shape. ``compile`` compiles it for an architecture."""

    op: str
    kernel: str
    source: str
    shape: dict[str, int]
    dtype: str
    compile: Callable[[int], MachineCode]
    recipes: list[str] = field(default_factory=list[str])

    def row(self, architecture: int) -> dict[str, Any]:
        """What a row of the table says before the kernel is compiled. It differs from that of all other jobs."""
        names = ("op", "kernel", "source", "recipes", "shape", "dtype")
        return {name: getattr(self, name) for name in names} | {"arch": architecture}


@dataclass(frozen=True, slots=True)
class Table:
    """The result, in the form of the JSON output."""

    kernels: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    @property
    def troubles(self) -> list[str]:
        """What must not be, in words."""
        words = [f"{_name(row)}: {row['error']}" for row in self.failed]
        for row in self.kernels:
            if row["stack"] or row["spill_loads"] or row["spill_stores"]:
                spills = f"{row['spill_loads']} loads and {row['spill_stores']} stores of spilled values"
                words.append(f"{_name(row)}: {row['stack']} bytes of stack, {spills}")
        return words

    def json(self) -> str:
        """The table with one line for each kernel."""
        rows = {
            name: ",\n".join(f"  {json.dumps(row)}" for row in getattr(self, name)) for name in ("kernels", "failed")
        }
        head = json.dumps({"v": 1, "triton": importlib.metadata.version("triton"), "nvcc": _cuda_version()})[1:-1]
        lists = ",\n".join(f' "{name}": [' + (f"\n{text}\n ]" if text else "]") for name, text in rows.items())
        return f"{{{head},\n{lists}}}\n"

    def text(self) -> str:
        """The table for a person."""
        columns = ("op", "kernel", "shape", "dtype", "arch", "registers", "stack", "shared", "spills", "load_bits")
        columns += ("store_bits", "mma", "offset_bits")
        cells = [[name.replace("_", " ") for name in columns]]
        for row in self.kernels:
            shape = " ".join(f"{name} {size}" for name, size in row["shape"].items())
            shown = row | {"shape": shape, "spills": row["spill_loads"] + row["spill_stores"]}
            cells.append(["-" if shown[name] in (None, "") else str(shown[name]) for name in columns])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def cannot_compile() -> str | None:
    """Which compiler is missing, and how to get it. None if both are here."""
    if jit.triton is None:
        return "Triton is not installed. Run: pip install triton"
    return nvrtc.cannot_compile()


def jobs() -> list[Job]:
    """The kernels of all published sizes, each once for a shape."""
    found: dict[str, Job] = {}
    for name in recipes.PUBLISHED:
        for job in _jobs(recipes.build(name)):
            key = json.dumps([job.op, job.kernel, job.shape, job.dtype])
            found.setdefault(key, job).recipes.append(name)
    return list(found.values())


def _jobs(recipe: recipes.Recipe) -> Iterator[Job]:
    model, tp = recipe.model, recipe.parallel.tp
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[recipe.precision]
    columns = model.padded_vocab_size // tp
    for it in (
        *dropout_add_layer_norm.compilations(model.hidden_size, dtype),
        *cross_entropy.compilations(columns, model.vocab_size, dtype),
        *bias_relu.compilations(model.hidden_size, dtype, tp),
    ):
        yield _triton_job(it)
    for (gradient, copy), name in adamw.KERNELS.items():
        yield _cuda_job(name, jit.TYPES[copy or gradient])
    yield _cuda_job("adamw_squares", "fp32")


def _triton_job(it: Compilation) -> Job:
    return Job(
        op=it.op,
        kernel=it.kernel,
        source="triton",
        shape=dict(it.shape),
        dtype=it.dtype,
        compile=functools.partial(machine_code.compiled, it),
    )


def _cuda_job(name: str, dtype: str) -> Job:
    return Job(op="adamw", kernel=name, source="cuda", shape={}, dtype=dtype, compile=functools.partial(_cuda, name))


def _cuda(name: str, architecture: int) -> MachineCode:
    # The kernels tell the cache which elements they read once, and the instructions for these say EF (evict first).
    # Other loads are of the table of tensors, or of the last elements of a tensor.
    code = machine_code.read(
        nvrtc.cubin(adamw.SOURCE, architecture).read_bytes(), name, lambda instruction: ".EF" in instruction
    )
    return replace(code, offset_bits=None if name == "adamw_squares" else _cuda_offset_bits())


def _cuda_offset_bits() -> int:
    """The width of a chunk's offset within its tensor, which is the type of ``first`` in the source."""
    declared = re.search(r"([\w ]+) first,", adamw.SOURCE.read_text())
    return 64 if declared and declared[1].strip() == "long long" else 32


def check(asked: Sequence[tuple[Job, int]], progress: Callable[[str], None]) -> Table:
    """Compile each job for its architecture. Each has a process of its own, so a compiler that dies is one failure.

    Args:
        asked: jobs and architectures.
        progress: is called with a line for each that has ended.
    """
    context = multiprocessing.get_context("fork")
    results: list[dict[str, Any]] = [{} for _ in asked]
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    with _nothing_compiled_before():
        for index, (job, architecture) in enumerate(asked):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_compile, args=(job, architecture, theirs))
            process.start()
            theirs.close()
            running[ours] = index, process
            while running and (len(running) == (os.cpu_count() or 1) or index + 1 == len(asked)):
                for ended in wait(list(running)):
                    assert isinstance(ended, Connection)
                    number, process = running.pop(ended)
                    results[number] = _result(ended, process)
                    outcome = results[number].get("error", "compiled").splitlines()[0]
                    done = sum(map(bool, results))
                    progress(f"{done}/{len(asked)} {_name(asked[number][0].row(asked[number][1]))}: {outcome}")
    rows = [job.row(architecture) | result for (job, architecture), result in zip(asked, results, strict=True)]
    kernels = [row for row in rows if "error" not in row]
    wanted = ("op", "kernel", "shape", "dtype", "arch", "error")
    return Table(kernels, [{name: row[name] for name in wanted} for row in rows if "error" in row])


@contextlib.contextmanager
def _nothing_compiled_before() -> Iterator[None]:
    """Let Triton keep what it compiles in a folder of this call alone."""
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_ALWAYS_COMPILE": "1"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= kept


def _compile(job: Job, architecture: int, results: Connection) -> None:
    try:
        results.send(asdict(job.compile(architecture)))
    except Exception as error:  # noqa: BLE001 - what a compiler says is the result
        results.send({"error": traceback.format_exception_only(error)[-1].strip()})


def _result(results: Connection, process: BaseProcess) -> dict[str, Any]:
    try:
        found = results.recv()
    except EOFError:
        found = {}
    process.join()
    results.close()
    return found or {"error": f"the compiler's process died (status {process.exitcode})"}


def _name(row: dict[str, Any]) -> str:
    shape = "".join(f" {name} {size}" for name, size in row["shape"].items())
    return f"{row['op']} {row['kernel']}{shape} {row['dtype']} sm_{row['arch']}"


def _cuda_version() -> str:
    found = nvrtc.compiler()
    return found.name.rpartition(" ")[2] if found else ""
