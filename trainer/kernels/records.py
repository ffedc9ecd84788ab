"""Records of tests on GPUs. With ``kernels=auto`` an op runs as a kernel only where a record of it is good.

`records.json` has one record for each op, architecture and dtype. A record counts for the files that were tested: after
any change of an op's files it counts no more, until a GPU has tested the op again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("records.json")

SIZES = ("1.3b", "6.7b")  # whose shapes are timed
LEAST_RATIO = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One op on one kind of GPU.

    Attributes:
        op: its name.
        architecture: of the GPU, for example 90.
        dtype: of the activations, for example bf16.
        date: of the test, UTC, as in 2026-12-01.
        torch: its version.
        triton: its version.
        sha256: of the op's files, as :func:`sha256` makes it.
        passed: whether values and gradients were right.
        worst_error: the largest difference from the reference, relative to the largest number.
        ratio: by size, the time of the compiled reference over the time of the kernel, forward and backward.
    """

    op: str
    architecture: int
    dtype: str
    date: str
    torch: str
    triton: str
    sha256: str
    passed: bool
    worst_error: float
    ratio: dict[str, float]


def sha256(op: str, folder: Path = FILE.parent) -> str:
    """SHA-256 of the op's Python file, followed by its CUDA C++ file if it has one."""
    files = [folder / f"{op}{ending}" for ending in (".py", ".cu")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def read(file: Path = FILE) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        return [Record(**row) for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold records of kernels ({error}): restore it, or write [] into it"
        ) from error


def refusal(op: str, architecture: int, dtype: str, file: Path = FILE) -> str | None:
    """Why no record lets the op run as a kernel, or None."""
    key = (op, architecture, dtype)
    record = next((it for it in read(file) if (it.op, it.architecture, it.dtype) == key), None)
    if record is None:
        return f"no record of a test in {dtype} on sm_{architecture}"
    tested = f"the test of {record.date} on sm_{architecture}"
    if record.sha256 != sha256(op):
        return f"its files have changed since {tested}"
    if not record.passed:
        return f"it failed {tested} (error {record.worst_error:.1e})"
    for size in SIZES:
        ratio = record.ratio.get(size)
        if ratio is None or not ratio >= LEAST_RATIO:
            speed = "was not timed" if ratio is None else f"had {ratio:.2f} times the speed of the compiled reference"
            return f"in {tested} it {speed} at {size}"
    return None


def write(new: Sequence[Record], file: Path = FILE) -> None:
    """Put records into the file. Each takes the place of an older one of its op, architecture and dtype."""
    merged = {(it.op, it.architecture, it.dtype): it for it in (*read(file), *new)}
    lines = [f"  {json.dumps(asdict(merged[key]))}" for key in sorted(merged)]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as temporary:
        temporary.write(text)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).chmod(0o644)
    Path(temporary.name).replace(file)
