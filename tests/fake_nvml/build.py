"""Builds the fake NVIDIA driver library, and changes its answers.

    driver = FakeDriver(tmp_path, gpus=8)
    process = subprocess.Popen(command, env={**os.environ, **driver.env})
    driver.set(3, ecc_volatile_uncorrected=1)   # the running process sees it at its next call
    driver.lose(5)

nvml.c lists the keys and their default values.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
LIBRARY = "libnvidia-ml.so.1"  # the name that pynvml loads
GPU_IS_LOST = 15
NOT_SUPPORTED = 3
DRIVER_NOT_LOADED = 9
XID_CRITICAL_ERROR = 8  # nvmlEventTypeXidCriticalError


def build(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """Compile the library, unless this source is compiled there already.

    Args:
        folder: Where the library goes, in a folder named by a hash of source and options.
        without: Names of NVML functions that the library must not have, as in an older driver.

    Returns:
        The folder that holds libnvidia-ml.so.1, for LD_LIBRARY_PATH.

    Raises:
        RuntimeError: There is no C compiler.
    """
    source = SOURCE.read_text()
    unknown = [name for name in without if name not in source]
    assert not unknown, f"the fake driver has no functions {unknown}"
    target = folder / f"nvml-{hashlib.sha256(repr((source, without)).encode()).hexdigest()[:12]}"
    if (target / LIBRARY).exists():
        return target
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the fake NVIDIA driver needs a C compiler: apt-get install gcc libc6-dev")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        built = Path(scratch, LIBRARY)
        absent = [f"-D{name}=absent_{name}" for name in without]
        flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, *absent, "-o", str(built), str(SOURCE)], check=True)
        built.replace(target / LIBRARY)  # another process may load it at any moment
    return target


class FakeDriver:
    """The driver of one node. `env` is for the process under test; the methods change what it reads.

    Args:
        folder: For the state file, and for the library unless there is one.
        gpus: How many GPUs.
        library: What `build` returned, to compile once for many tests, or without some functions.
    """

    def __init__(self, folder: Path, gpus: int = 8, library: Path | None = None) -> None:
        self._library = library or build(folder)
        self._file = folder / "nvml.state"
        self._state: dict[str, object] = {"gpus": gpus}
        self._events = 0
        self._write()

    @property
    def env(self) -> dict[str, str]:
        """Environment of the process under test. The loader reads LD_LIBRARY_PATH only at its start."""
        inherited = os.environ.get("LD_LIBRARY_PATH")
        paths = [str(self._library), *([inherited] if inherited else [])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "FAKE_NVML_STATE": str(self._file)}

    def set(self, gpu: int | None = None, **values: object) -> None:
        """Set keys of a GPU, or of the node if no GPU is given. None resets a key to its healthy value.

        Args:
            gpu: The GPU's index.
            **values: As in nvml.c, such as `temperature=91`. "!3" lets a call fail with NVML error 3.
        """
        source = SOURCE.read_text()
        unknown = [key for key in values if f'"{key}"' not in source and not key.startswith(("field_", "nvlink_"))]
        assert not unknown, f"the fake driver never reads {unknown}: see the keys in {SOURCE}"
        prefix = "" if gpu is None else f"{gpu}."
        for key, value in values.items():
            if value is None:
                self._state.pop(prefix + key, None)
            else:
                self._state[prefix + key] = int(value) if isinstance(value, bool) else value
        self._write()

    def lose(self, gpu: int) -> None:
        """Let a GPU fall off the bus: every call on it returns NVML_ERROR_GPU_IS_LOST."""
        self.set(gpu, error=GPU_IS_LOST)

    def no_ecc(self, gpu: int) -> None:
        """Make it a GPU without ECC memory."""
        self.set(gpu, ecc_mode=f"!{NOT_SUPPORTED}")

    def unload(self) -> None:
        """Unload the kernel driver: nvmlInit fails with NVML_ERROR_DRIVER_NOT_LOADED."""
        self.set(init=DRIVER_NOT_LOADED)

    def hang(self, gpu: int | None = None, seconds: float = math.inf) -> None:
        """Let calls on a GPU, or on the driver as a whole, not return for some seconds or until `resume`."""
        self.set(gpu, hang_until=time.time() + seconds)

    def resume(self, gpu: int | None = None) -> None:
        """End a hang."""
        self.set(gpu, hang_until=None)

    def xid(self, gpu: int, number: int) -> None:
        """Deliver an Xid critical error to processes that wait for events of the GPU."""
        self.event(gpu, XID_CRITICAL_ERROR, number)

    def event(self, gpu: int, event_type: int, data: int) -> None:
        """Deliver an event of any type."""
        self._events += 1
        self._state[f"event_{self._events}"] = f"{gpu} {event_type} {data}"
        self._write()

    def _write(self) -> None:
        lines = "".join(f"{key}={value}\n" for key, value in self._state.items())
        fresh = self._file.with_suffix(".new")
        fresh.write_text(lines, encoding="utf-8", errors="surrogateescape")  # a text may be any bytes
        fresh.replace(self._file)  # a reader sees the old state or the new one, never half of one
