"""NVML readings through nvidia-ml-py, in a process of their own: a call that never returns must not stop the agent.

`python -m opt_ops.adapters.nvml --every 2` prints one JSON line a reading. What the driver does not say is null, and a
node without NVML says so: `{"nvml": "absent"}`. `Probe` runs that process for the agent and turns its silence into a
reading of its own, `hung`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pynvml

_RECOVERY = {
    getattr(pynvml, name): name.removeprefix("NVML_GPU_RECOVERY_ACTION_").lower()
    for name in dir(pynvml)
    if name.startswith("NVML_GPU_RECOVERY_ACTION_")
}


class Reader:
    """Reads all GPUs of this node. A GPU that was seen once keeps its identity after it is lost."""

    def __init__(self) -> None:
        self._identity: dict[int, dict[str, str | None]] = {}
        self._ready = False

    def read(self) -> dict[str, Any]:
        """One reading: `{"nvml": "ok", "gpus": […]}`, or what keeps NVML from answering."""
        try:
            if not self._ready:
                pynvml.nvmlInit()
                self._ready = True
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            return {"nvml": _state(error), "gpus": []}
        indices = sorted(self._identity.keys() | set(range(count)))
        return {"nvml": "ok", "gpus": [self._gpu(index) for index in indices]}

    def _gpu(self, index: int) -> dict[str, Any]:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if index not in self._identity:
                self._identity[index] = {
                    "uuid": _or_none(pynvml.nvmlDeviceGetUUID, handle),
                    "serial": _or_none(pynvml.nvmlDeviceGetSerial, handle),
                    "name": _or_none(pynvml.nvmlDeviceGetName, handle),
                }
            return {"index": index, **self._identity[index], **_values(handle)}
        except pynvml.NVMLError as error:
            return {"index": index, **self._identity.get(index, {}), "error": _name(error)}


def _values(handle: Any) -> dict[str, Any]:
    """What matters of a GPU that answers; its loss is raised, everything else unknown is None."""
    remapped = _or_none(pynvml.nvmlDeviceGetRemappedRows, handle)
    milliwatts = _or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
    return {
        "ecc_uncorrected": _or_none(
            pynvml.nvmlDeviceGetTotalEccErrors,
            handle,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        "remap_pending": bool(remapped[2]) if remapped else None,
        "remap_failed": bool(remapped[3]) if remapped else None,
        "recovery_action": _or_none(_recovery_action, handle),
        "temperature": _or_none(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_watts": None if milliwatts is None else milliwatts / 1000,
    }


def _recovery_action(handle: Any) -> str | None:
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return _RECOVERY.get(value.value.uiVal, f"unknown_{value.value.uiVal}")


_OF_THE_GPU = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)


def _or_none(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's answer; None where this driver or card has none. The loss of the whole GPU goes on up."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value in _OF_THE_GPU:  # type: ignore[attr-defined]
            raise
        return None


def _name(error: pynvml.NVMLError) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removeprefix("NVMLError_")).lower()


def _state(error: pynvml.NVMLError) -> str:
    return "absent" if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND else _name(error)  # type: ignore[attr-defined]


class Probe:
    """The reading process, as the agent sees it: `latest` never blocks."""

    def __init__(self, every: float, deadline: float) -> None:
        self._every = every
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._latest: dict[str, Any] | None = None
        self._heard_at = 0.0

    def latest(self) -> dict[str, Any] | None:
        """The newest reading; `hung` when none came within the deadline, None before the first."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        if lines:
            self._latest, self._heard_at = json.loads(lines[-1]), time.monotonic()
        elif time.monotonic() - self._heard_at > self._deadline:
            self._latest = {"nvml": "hung", "gpus": []}
            self._process.kill()  # a call stuck in the kernel survives even this; the next process tries again
        return self._latest

    def close(self) -> None:
        """End the reading process."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        command = [sys.executable, "-m", "opt_ops.adapters.nvml", "--every", str(self._every)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._buffer, self._heard_at = b"", time.monotonic()


def main() -> None:
    """Print a reading every so often, until the reader of our output is gone."""
    parser = argparse.ArgumentParser(description="Prints NVML readings as JSON lines.")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between readings")
    parser.add_argument("--once", action="store_true", help="one reading, then leave")
    options = parser.parse_args()
    reader = Reader()
    while True:
        try:
            print(json.dumps(reader.read()), flush=True)
        except BrokenPipeError:
            return
        if options.once:
            return
        time.sleep(options.every)


if __name__ == "__main__":
    main()
