"""Readings of a node's GPUs and host, in a process of their own: a call that never returns must not stop the agent.

`python -m opt_ops.node readings --every 2` prints one JSON line for each reading: NVML through nvidia-ml-py, and the
host. A value that the driver does not report, or not as text, is null. A node without NVML reports
`{"nvml": "absent"}`. `Probe` runs that process for the agent. If it stays silent, the reading is `hung`; if it ends
again and again, `crashed`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml

from opt_ops.node import host
from opt_ops.node.error_record import ErrorRecord
from opt_ops.node.kernel_log import KernelLog
from opt_ops.node.line_process import STARTING, LineProcess, end_with_parent, in_child, own_stdout
from opt_ops.node.reading import MOST_GPUS, reading_of

_RECOVERY = {
    getattr(pynvml, name): name.removeprefix("NVML_GPU_RECOVERY_ACTION_").lower()
    for name in dir(pynvml)
    if name.startswith("NVML_GPU_RECOVERY_ACTION_")
}


SLOW_SECONDS = 30.0
"""Between two readings of slow or expensive values: modes, firmware, links, SRAM, retired pages."""

_MOST_LINKS = 18  # NVLinks of a Hopper or Blackwell GPU

ONCE_SECONDS = 15.0
"""For one reading that a command waits for; without persistence mode the driver needs seconds to start."""

MOST_EVENTS = 1000
"""Xids of NVML that wait for the agent."""


class GpuReader:
    """Reads all GPUs of this node. A GPU that was read once keeps its identity after it is lost."""

    def __init__(self) -> None:
        self._identity: dict[int, dict[str, Any]] = {}
        self._slow: dict[int, tuple[float, dict[str, Any]]] = {}
        self._driver: str | None = None
        self._events: Any = None
        self._ready = False

    def read(self) -> dict[str, Any]:
        """Return one reading: `{"nvml": "ok", "gpus": […]}`, or the error of NVML instead of `ok`."""
        try:
            if not self._ready:
                _initialize()
                self._ready = True
                self._driver = _or_none(pynvml.nvmlSystemGetDriverVersion)
            count = pynvml.nvmlDeviceGetCount()
            if self._events is None and count <= MOST_GPUS:
                self._events = _subscribe(count)
        except pynvml.NVMLError as error:
            return {"nvml": _state(error), "gpus": []}
        if count > MOST_GPUS:
            return {"nvml": "implausible_count", "gpus": []}
        indices = sorted(self._identity.keys() | set(range(count)))
        gpus = [self._gpu(index) for index in indices]
        return {"nvml": "ok", "driver": self._driver, "gpus": gpus, "xid_events": self._xids()}

    def _gpu(self, index: int) -> dict[str, Any]:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            identity = {
                "uuid": _or_none(pynvml.nvmlDeviceGetUUID, handle),
                "serial": _or_none(pynvml.nvmlDeviceGetSerial, handle),
                "name": _or_none(pynvml.nvmlDeviceGetName, handle),
                "pci": _or_none(_address, handle),
            }
            values = _values(handle)
            read_at, slow = self._slow.get(index, (-SLOW_SECONDS, {}))
            if time.monotonic() - read_at >= SLOW_SECONDS:
                slow = _slow_values(handle)
                self._slow[index] = (time.monotonic(), slow)
        except pynvml.NVMLError as error:
            return {"index": index, **self._identity.get(index, {}), "error": _name(error)}
        except Exception as error:  # noqa: BLE001  (broad: whatever a driver answers for one GPU, the others are read)
            return {"index": index, **self._identity.get(index, {}), "error": f"unreadable_{type(error).__name__}"}
        self._identity[index] = identity
        return {"index": index, **identity, **values, **slow}

    def _xids(self) -> list[dict[str, Any]]:
        """Xids since the last reading. Any other error of the wait shows in the readings of the GPUs."""
        found: list[dict[str, Any]] = []
        with suppress(pynvml.NVMLError):
            while self._events is not False and len(found) < MOST_EVENTS:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
                pci = _address(event.device)
                line = f"NVML event: Xid (PCI:{pci}): {event.eventData}"
                found.append({"code": event.eventData, "pci": pci, "line": line, "at": time.time()})
        return found


def _initialize() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:  # type: ignore[attr-defined]
            raise
        # An old library has only the older name of the function, which pynvml does not call.
        older = getattr(ctypes.CDLL("libnvidia-ml.so.1"), "nvmlInit_v2", None)
        if older is None:
            raise
        if (code := older()) != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code) from error


def _address(handle: Any) -> str:
    """PCI address in the form of the kernel log: `0000:3b:00`."""
    address = pynvml.nvmlDeviceGetPciInfo(handle)
    return f"{address.domain:04x}:{address.bus:02x}:{address.device:02x}"


def _subscribe(count: int) -> Any:
    """Subscribe to the Xids of all GPUs. Returns the event set; False if the driver has none."""
    try:
        events = pynvml.nvmlEventSetCreate()
    except pynvml.NVMLError:
        return False
    for index in range(count):
        with suppress(pynvml.NVMLError):  # a lost GPU, or one without events, sends none
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    return events


def _values(handle: Any) -> dict[str, Any]:
    """Fast values of a GPU. The loss of the GPU is raised; any other missing value is None."""
    remapped = _or_none(pynvml.nvmlDeviceGetRemappedRows, handle)
    milliwatts = _or_none(pynvml.nvmlDeviceGetPowerUsage, handle)
    millijoules = _or_none(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    memory = _or_none(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    utilization = _or_none(pynvml.nvmlDeviceGetUtilizationRates, handle)
    processes = _or_none(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return {
        "ecc_uncorrected": _ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC),
        "remap_pending": bool(remapped[2]) if remapped else None,
        "remap_failed": bool(remapped[3]) if remapped else None,
        "rows_remapped": remapped[1] if remapped else None,
        "recovery_action": _or_none(_recovery_action, handle),
        "temperature": _or_none(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_watts": None if milliwatts is None else milliwatts / 1000,
        "energy_joules": None if millijoules is None else millijoules / 1000,
        "throttle": _throttle(handle),
        "utilization": None if utilization is None else utilization.gpu,
        "memory_used": None if memory is None else memory.used,
        "processes": None if processes is None else len(processes),
        "pcie_width": _or_none(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        "pcie_generation": _or_none(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        "pcie_replays": _or_none(pynvml.nvmlDeviceGetPcieReplayCounter, handle),
    }


def _slow_values(handle: Any) -> dict[str, Any]:
    """Values that are read every `SLOW_SECONDS`."""
    ecc = _or_none(pynvml.nvmlDeviceGetEccMode, handle)
    sram = _or_none(_sram, handle)
    links, link_errors = _nvlinks(handle)
    persistence = _or_none(pynvml.nvmlDeviceGetPersistenceMode, handle)
    return {
        "inforom": _or_none(pynvml.nvmlDeviceGetInforomImageVersion, handle),
        "vbios": _or_none(pynvml.nvmlDeviceGetVbiosVersion, handle),
        "ecc_on": bool(ecc[0]) if ecc else None,
        "ecc_on_next": bool(ecc[1]) if ecc else None,
        "ecc_corrected": _ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC),
        "ecc_uncorrected_ever": _ecc(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_AGGREGATE_ECC),
        "sram_uncorrected_ever": sram[0] if sram else None,
        "sram_over_threshold": sram[1] if sram else None,
        "retired_pages": _retired(handle),
        "retired_pending": _flag(_or_none(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)),
        "temperature_limit": _or_none(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX
        ),
        "memory_temperature": _or_none(_field, handle, pynvml.NVML_FI_DEV_MEMORY_TEMP),
        "memory_temperature_limit": _or_none(
            pynvml.nvmlDeviceGetTemperatureThreshold, handle, pynvml.NVML_TEMPERATURE_THRESHOLD_MEM_MAX
        ),
        "fabric": _or_none(_fabric, handle),
        "persistence": _flag(persistence),
        "clock_most": _or_none(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "pcie_width_most": _or_none(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        "pcie_generation_most": _or_none(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        "nvlinks": links,
        "nvlink_errors": link_errors,
    }


def _ecc(handle: Any, kind: int, counter: int) -> int | None:
    return _or_none(pynvml.nvmlDeviceGetTotalEccErrors, handle, kind, counter)


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _throttle(handle: Any) -> int | None:
    reasons = _or_none(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if reasons is None:  # its name before driver 535
        reasons = _or_none(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return reasons


def _sram(handle: Any) -> tuple[int, bool] | None:
    status: Any = pynvml.c_nvmlEccSramErrorStatus_v1_t()
    pynvml.nvmlDeviceGetSramEccErrorStatus(handle, ctypes.byref(status))
    uncorrected = status.aggregateUncParity + status.aggregateUncSecDed
    return uncorrected, bool(status.bThresholdExceeded)


def _retired(handle: Any) -> int | None:
    causes = (pynvml.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS, 1)
    pages = [_or_none(pynvml.nvmlDeviceGetRetiredPages, handle, cause) for cause in causes]
    return None if None in pages else sum(map(len, pages))


_LINK_FIELDS = (
    pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
    pynvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
)


def _nvlinks(handle: Any) -> tuple[int | None, int | None]:
    """Number of links that are up, and the sum of their errors. Old cards count errors in total, new cards by link."""
    states = [_or_none(pynvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(_MOST_LINKS)]
    there = [link for link, state in enumerate(states) if state is not None]
    if not there:
        return None, None
    by_link = [(pynvml.NVML_FI_DEV_NVLINK_COUNT_LINK_RECOVERY_EVENTS, link) for link in there]
    fields = _or_none(pynvml.nvmlDeviceGetFieldValues, handle, [*_LINK_FIELDS, *by_link]) or ()
    counts = [_count(field) for field in fields if field.nvmlReturn == pynvml.NVML_SUCCESS]
    return sum(bool(state) for state in states), sum(counts) if counts else None


def _count(field: Any) -> int:
    narrow = field.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
    return field.value.uiVal if narrow else field.value.ullVal


def _field(handle: Any, field: int) -> int | None:
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [field])
    return _count(value) if value.nvmlReturn == pynvml.NVML_SUCCESS else None


_FABRIC = {
    pynvml.NVML_GPU_FABRIC_STATE_NOT_STARTED: "not_started",
    pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS: "in_progress",
    pynvml.NVML_GPU_FABRIC_STATE_COMPLETED: "completed",
}
_DEGRADED = (
    pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_DEGRADED_BW,
    pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_ROUTE_UNHEALTHY,
)


def _fabric(handle: Any) -> str | None:
    """State of the GPU in the fabric manager; None for a card without fabric."""
    info: Any = pynvml.c_nvmlGpuFabricInfoV_t()
    pynvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info))
    state = _FABRIC.get(info.state)
    if state != "completed":
        return state
    if info.status != pynvml.NVML_SUCCESS:
        return "failed"
    # Two bits each: 0 not reported, 1 yes, 2 no.
    return "degraded" if any((info.healthMask >> shift) & 3 == 1 for shift in _DEGRADED) else state


def _recovery_action(handle: Any) -> str | None:
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    return _RECOVERY.get(value.value.uiVal, f"unknown_{value.value.uiVal}")


_OF_THE_GPU = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)


def _or_none(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the answer of a call; None if this driver or card has none, or a text is not UTF-8.

    The loss of the whole GPU is raised.
    """
    try:
        return call(*arguments)
    except (UnicodeDecodeError, pynvml.NVMLLibraryMismatchError):
        return None
    except pynvml.NVMLError as error:
        if error.value in _OF_THE_GPU:  # type: ignore[attr-defined]
            raise
        return None


def _name(error: pynvml.NVMLError) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removeprefix("NVMLError_")).lower()


def _state(error: pynvml.NVMLError) -> str:
    return "absent" if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND else _name(error)  # type: ignore[attr-defined]


class Probe:
    """What NVML says, from the reading process. No method blocks for long."""

    def __init__(self, every: float, deadline: float) -> None:
        command = [sys.executable, "-m", "opt_ops.node", "readings", "--every", str(every), "--no-machine"]
        self._process = LineProcess(command, deadline, reading_of)
        self._xids: list[dict[str, Any]] = []

    def latest(self) -> dict[str, Any] | None:
        """Return the newest reading; `hung` or `crashed` if there is none that still counts, None before the first."""
        for reading in self._process.read():
            self._xids = [*self._xids, *reading.pop("xid_events")][-MOST_EVENTS:]
        if self._process.state == STARTING:
            return None
        return self._process.newest or {"nvml": self._process.state, "gpus": []}

    @property
    def age(self) -> float | None:
        """Seconds since the newest reading came; None before the first one."""
        return self._process.age

    @property
    def left_out(self) -> int:
        """Lines of the process that are no readings, since the agent started."""
        return self._process.left_out

    def xids(self) -> list[dict[str, Any]]:
        """Return the Xid events since the last call, in the form of a heartbeat."""
        new, self._xids = self._xids, []
        return [{**xid, "switch": False, "drill": None} for xid in new]

    def close(self) -> None:
        """End the reading process."""
        self._process.close()


def main() -> None:
    """Print readings at intervals until the other end of the pipe is closed."""
    parser = argparse.ArgumentParser(
        prog="python -m opt_ops.node readings", description="Prints NVML readings as JSON lines."
    )
    parser.add_argument("--every", type=float, default=2.0, help="seconds between readings")
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the file system of checkpoints")
    parser.add_argument("--no-machine", action="store_true", help="without the readings of the host")
    parser.add_argument("--once", action="store_true", help="print one reading with the node's name, then exit")
    parser.add_argument(
        "--xid-minutes", type=float, default=0.0, help="with --once: Xids of the last MINUTES in the kernel log"
    )
    options = parser.parse_args()
    reader, write = GpuReader(), own_stdout()
    if not options.once:
        end_with_parent()
    while not options.once:
        machine = {} if options.no_machine else {"machine": host.read(options.folder)}
        try:
            write({**reader.read(), **machine})
        except BrokenPipeError:
            return
        time.sleep(options.every)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    log, errors = KernelLog(since=time.time() - 60 * options.xid_minutes), ErrorRecord()
    for _ in range(100):  # of 20,000 records each: more than a kernel log holds
        for found in log.xids():
            errors.add(found)
        if not log.behind:
            break
    reading = in_child(reader.read, ONCE_SECONDS, reading_of)
    said = {"nvml": reading, "gpus": []} if isinstance(reading, str) else reading
    write({"node": node, **said, "xids": errors.entries(), "machine": host.read(options.folder)})
