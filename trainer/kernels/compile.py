"""Compile a Triton kernel for a GPU that is not here, and read its machine code.

Triton's interface for this has no documentation, and it changes between versions: only this file knows it. The tools
that read machine code come with Triton. The formats of what they and Triton print were read off versions 3.7.1 and 13.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.kernels.jit import Compilation, triton

_WARP = 32  # threads
_VECTORS = {"%weight", "%bias"}  # parameters that are one row, so their offsets are small

_Place = tuple[int, int]  # line and column


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCode:
    """What a kernel needs of a GPU.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of a program.
        spill_loads: instructions that read local memory. Values that found no register are there.
        spill_stores: instructions that write it.
        load_bits: width of the narrowest load of a row. None if the kernel loads no row.
        store_bits: the same of stores.
        mma: the instruction for products of matrices, for example HGMMA. None if there is none.
        offset_bits: width of the product of a row's number and the length of a row. None if there is no such product.
    """

    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    load_bits: int | None
    store_bits: int | None
    mma: str | None
    offset_bits: int | None


def compiled(compilation: Compilation, architecture: int) -> MachineCode:
    """The machine code of a Triton kernel for ``architecture``, for example 90.

    Raises:
        Exception: of Triton's, if it cannot compile the kernel.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = list(compilation.signature)
    source = ASTSource(
        compilation.function,
        dict(compilation.signature),
        dict(compilation.constexprs),
        {(parameters.index(name),): [["tt.divisibility", 16]] for name in compilation.divisible},
    )
    kernel = triton.compile(
        source, target=GPUTarget("cuda", architecture, _WARP), options={"num_warps": compilation.num_warps}
    )
    accesses = list(_row_accesses(kernel.asm["ttgir"], compilation))
    widths = _widths(kernel.asm["ptx"])
    load, store = (
        min((width for access in accesses if access.kind == kind for width in widths[access.place]), default=None)
        for kind in ("load", "store")
    )
    offsets = [access.offset_bits for access in accesses if access.offset_bits]
    return replace(
        read(kernel.asm["cubin"], kernel.metadata.name, lambda _: False),
        shared=kernel.metadata.shared,
        load_bits=load,
        store_bits=store,
        offset_bits=min(offsets, default=None),
    )


def _widths(ptx: str) -> Mapping[_Place, list[int]]:
    """By line and column of the source, the widths of its loads and stores. The machine code has no columns."""
    widths: dict[_Place, list[int]] = defaultdict(list)
    place = 0, 0
    for text in ptx.splitlines():
        if written := re.match(r"\s*\.loc\s+\d+ (\d+) (\d+)", text):
            place = int(written[1]), int(written[2])
        elif access := re.search(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", text):
            widths[place].append(int(access[1] or 1) * int(access[2]))
    return widths


# ---- machine code


def read(
    cubin: bytes,
    function: str,
    of_row: Callable[[str], bool],
) -> MachineCode:
    """What the kernel ``function`` of a cubin needs.

    Args:
        cubin: the file's content.
        function: name of the kernel in it.
        of_row: whether the load or store with this name, for example LDG.E.EF.128, is of a row.

    Raises:
        LookupError: there is no such function.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = re.search(
            rf"Function {re.escape(function)}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)",
            _tool("cuobjdump", "--dump-resource-usage", file.name),
        )
        code = _tool("nvdisasm", "-c", file.name)
    if resources is None:
        raise LookupError(f"the cubin has no function {function}")
    registers, stack, shared = map(int, resources.groups())
    names = list(_instructions(code, function))
    load, store = (
        min((_bits(name) for name in names if name.startswith(prefix) and of_row(name)), default=None)
        for prefix in ("LDG", "STG")
    )
    return MachineCode(
        registers=registers,
        stack=stack,
        shared=shared,
        spill_loads=sum(name.startswith("LDL") for name in names),
        spill_stores=sum(name.startswith("STL") for name in names),
        load_bits=load,
        store_bits=store,
        mma=next((name.partition(".")[0] for name in names if re.match(r"\w*MMA\b", name)), None),
        offset_bits=None,
    )


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _instructions(code: str, function: str) -> Iterator[str]:
    """The name, for example LDG.E.128, of each instruction of ``function``."""
    inside = False
    for text in code.splitlines():
        if section := re.match(r"\.text\.(\S+):", text):
            inside = section[1] == function
        elif inside and (instruction := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)):
            yield instruction[1]


def _bits(instruction: str) -> int:
    """Bits that a thread reads or writes: 32 unless the instruction says otherwise."""
    size = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", instruction)
    return int(size[1]) if size else 32


# ---- Triton's intermediate code


@dataclass(frozen=True, slots=True)
class _Access:
    """A load or store of a block of a row. ``offset_bits`` is as in :class:`MachineCode`."""

    kind: str
    place: _Place
    offset_bits: int | None


# What only gives a value another shape or width.
_SAME = re.compile(r"arith\.extsi|arith\.extui|tt\.splat|tt\.broadcast|tt\.expand_dims|ttg\.convert_layout")


def _row_accesses(ttgir: str, compilation: Compilation) -> Iterator[_Access]:
    """The loads and stores of whole blocks: at least one element for each thread."""
    definitions = _definitions(ttgir)
    for text in ttgir.splitlines():
        access = re.search(r"tt\.(load|store) (%\w+).* : tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", text)
        if access is None or _product(access[3]) < compilation.num_warps * _WARP:
            continue
        of_activations = access[4] in {"f32", "f16", "bf16"} and compilation.dtype.replace("fp", "f") == access[4]
        bits = _offset_bits(access[2], definitions, compilation) if of_activations else None
        yield _Access(access[1], _place(text, ttgir), bits)


def _product(sizes: str) -> int:
    product = 1
    for size in sizes.split("x")[:-1]:
        product *= int(size)
    return product


def _definitions(ttgir: str) -> dict[str, list[str]]:
    """By value, the texts that define it: an operation, and for a variable of a loop what each round gives it."""
    definitions: dict[str, list[str]] = {}
    loops: list[list[str]] = []
    for text in ttgir.splitlines():
        if defined := re.match(r"\s*(%\w+)(?::\d+)? = (.*)", text):
            definitions.setdefault(defined[1], []).append(defined[2])
        if "scf.for" in text or "scf.if" in text or "scf.while" in text:
            carried = re.findall(r"(%\w+) = (%[\w#]+)", text.partition("iter_args")[2])
            loops.append([name for name, _ in carried])
            for name, first in carried:
                definitions.setdefault(name, []).append(first)
        elif "scf.yield" in text and loops:
            values = re.findall(r"%[\w#]+", text.partition(" : ")[0])
            for name, value in zip(loops[-1], values, strict=False):
                definitions[name].append(value)
            if loops[-1]:
                loops.pop()
    return definitions


def _offset_bits(pointer: str, definitions: Mapping[str, list[str]], compilation: Compilation) -> int | None:
    """The width of the product of a row's number and the length of a row that is part of ``pointer``.

    A tile's number times its width looks the same where a tile is as wide as a row. So the widest product counts.
    """
    lengths = {name for name in compilation.divisible if not compilation.signature[name].startswith("*")}
    seen: set[str] = set()
    found: list[int] = []
    open_values = [pointer]
    while open_values:
        value = open_values.pop().partition("#")[0]
        if value in seen:
            continue
        seen.add(value)
        for text in definitions.get(value, []):
            if text.startswith("tt.load"):
                continue  # a number from memory is no row
            operands = re.findall(r"%\w+", text.partition(" : ")[0])
            if text.startswith("arith.muli") and any(
                _is_length(operand, definitions, lengths, set(compilation.shape.values())) for operand in operands
            ):
                found += [int(bits) for bits in re.findall(r"i(32|64)\b", text.partition(" : ")[2])[:1]]
            open_values += operands
    return None if seen & _VECTORS else max(found, default=None)


def _is_length(
    value: str, definitions: Mapping[str, list[str]], parameters: Collection[str], constants: Collection[int]
) -> bool:
    while value in definitions and _SAME.match(definitions[value][0]):
        value = re.findall(r"%\w+", definitions[value][0])[0]
    if value not in definitions:
        return value.removeprefix("%") in parameters
    constant = re.match(r"arith\.constant (?:dense<)?(-?\d+)>? :", definitions[value][0])
    return constant is not None and int(constant[1]) in constants


def _place(text: str, ttgir: str) -> _Place:
    """Line and column of an operation. Of a function that was inlined, they are those inside."""
    place = text.rpartition("loc(")[2]
    while place:
        if written := re.search(r'"[^"]*\.py":(\d+):(\d+)', place):
            return int(written[1]), int(written[2])
        name = re.search(r"#loc\d*", place)
        definition = name and re.search(rf"^{name[0]} = loc\((.*)\)$", ttgir, re.MULTILINE)
        place = definition[1] if definition else ""
    return 0, 0
