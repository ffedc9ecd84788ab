"""The fake driver under the real pynvml, in a process of its own, as the node agent uses it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from .build import FakeDriver, build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READER = """
import ctypes, json, sys
from pynvml import *
for line in sys.stdin:
    try:
        answer = eval(line)
    except NVMLError as error:
        answer = type(error).__name__
    print(json.dumps(answer, default=str), flush=True)
"""


class Reader:
    """A process with pynvml that evaluates one expression at a time."""

    def __init__(self, driver: FakeDriver) -> None:
        command = [sys.executable, "-c", READER]
        env = {**os.environ, **driver.env}
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, expression: str, seconds: float = 60) -> Any:
        """What the expression gives, the name of the NVML error it raises, or "no answer" within the time."""
        self.send(expression)
        return self.answer(seconds)

    def gpu(self, index: int, call: str) -> Any:
        """Call a function of GPU `index`; `call` is without its first argument, the handle."""
        function, _, rest = call.rstrip(")").partition("(")
        return self.ask(f"{function}(handles[{index}]{', ' + rest if rest else ''})")

    def send(self, expression: str) -> None:
        assert self._process.stdin is not None
        print(expression, file=self._process.stdin, flush=True)

    def answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return json.loads(self._process.stdout.readline()) if ready else "no answer"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("nvml"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def driver(tmp_path: Path, library: Path) -> FakeDriver:
    return FakeDriver(tmp_path, gpus=4, library=library)


@pytest.fixture
def reader(driver: FakeDriver) -> Iterator[Reader]:
    reader = Reader(driver)
    assert reader.ask("nvmlInit()") is None
    reader.ask("(handles := [nvmlDeviceGetHandleByIndex(i) for i in range(nvmlDeviceGetCount())])")
    yield reader
    reader.close()


SRAM = "(s := c_nvmlEccSramErrorStatus_v1_t()) and nvmlDeviceGetSramEccErrorStatus(handles[0], ctypes.byref(s))"


def test_a_healthy_node(reader: Reader) -> None:
    assert reader.ask("nvmlDeviceGetCount()") == 4
    assert reader.ask("nvmlSystemGetDriverVersion()") == "570.124.06"
    assert reader.ask("nvmlSystemGetNVMLVersion()") == "12.570.124.06"
    assert reader.gpu(1, "nvmlDeviceGetName()") == "NVIDIA H200"
    assert reader.gpu(1, "nvmlDeviceGetIndex()") == 1
    identities = [reader.gpu(index, f"nvmlDeviceGet{what}()") for index in range(4) for what in ("UUID", "Serial")]
    assert len(set(identities)) == 8
    assert reader.ask("nvmlDeviceGetPciInfo(handles[1]).busId") == "00000000:2B:00.0"
    assert reader.ask("nvmlDeviceGetPciInfo(handles[1]).bus") == 0x2B
    assert reader.gpu(0, "nvmlDeviceGetTotalEccErrors(1, 0)") == 0
    assert reader.gpu(0, "nvmlDeviceGetEccMode()") == [1, 1]
    assert reader.gpu(0, "nvmlDeviceGetRemappedRows()") == [0, 0, 0, 0]
    assert reader.gpu(0, "nvmlDeviceGetPersistenceMode()") == 1
    assert reader.gpu(0, "nvmlDeviceGetVbiosVersion()") == "96.00.A0.00.01"
    assert reader.gpu(0, "nvmlDeviceGetComputeRunningProcesses()") == []
    assert reader.gpu(0, "nvmlDeviceGetRetiredPages(0)") == "NVMLError_NotSupported"
    assert reader.gpu(0, "nvmlDeviceGetRetiredPagesPendingStatus()") == "NVMLError_NotSupported"
    widths = ["nvmlDeviceGetCurrPcieLinkWidth()", "nvmlDeviceGetMaxPcieLinkWidth()"]
    generations = ["nvmlDeviceGetCurrPcieLinkGeneration()", "nvmlDeviceGetMaxPcieLinkGeneration()"]
    assert [reader.gpu(0, call) for call in widths + generations] == [16, 16, 5, 5]
    assert reader.ask("nvmlDeviceGetHandleByIndex(4)") == "NVMLError_InvalidArgument"
    assert reader.ask("nvmlShutdown()") is None
    assert reader.ask("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"


@pytest.mark.parametrize(
    ("state", "call", "before", "after"),
    [
        ({"temperature": 91}, "nvmlDeviceGetTemperature(0)", 30, 91),
        ({"temperature": 92}, "nvmlDeviceGetTemperatureV1(0)", 30, 92),
        ({"threshold_slowdown": 80}, "nvmlDeviceGetTemperatureThreshold(1)", 90, 80),
        ({"power": 701_000}, "nvmlDeviceGetPowerUsage()", 75_000, 701_000),
        ({"energy": 2**40}, "nvmlDeviceGetTotalEnergyConsumption()", 1_000_000, 2**40),
        ({"power_limit": 300_000}, "nvmlDeviceGetEnforcedPowerLimit()", 700_000, 300_000),
        ({"persistence_mode": False}, "nvmlDeviceGetPersistenceMode()", 1, 0),
        ({"clocks_event_reasons": 0x48}, "nvmlDeviceGetCurrentClocksEventReasons()", 1, 0x48),
        ({"clocks_event_reasons": "0x80"}, "nvmlDeviceGetCurrentClocksThrottleReasons()", 1, 0x80),
        ({"ecc_volatile_corrected": 5}, "nvmlDeviceGetTotalEccErrors(0, 0)", 0, 5),
        ({"ecc_volatile_uncorrected": 6}, "nvmlDeviceGetTotalEccErrors(1, 0)", 0, 6),
        ({"ecc_aggregate_corrected": 2**40}, "nvmlDeviceGetTotalEccErrors(0, 1)", 0, 2**40),
        ({"ecc_aggregate_uncorrected": 8}, "nvmlDeviceGetTotalEccErrors(1, 1)", 0, 8),
        ({"ecc_mode": 0}, "nvmlDeviceGetTotalEccErrors(1, 0)", 0, "NVMLError_NotSupported"),
        ({"ecc_mode_pending": 0}, "nvmlDeviceGetEccMode()", [1, 1], [1, 0]),
        ({"remap_corrected": 1, "remap_uncorrected": 2}, "nvmlDeviceGetRemappedRows()", [0, 0, 0, 0], [1, 2, 0, 0]),
        ({"remap_pending": True}, "nvmlDeviceGetRemappedRows()", [0, 0, 0, 0], [0, 0, 1, 0]),
        ({"remap_failure": True}, "nvmlDeviceGetRemappedRows()", [0, 0, 0, 0], [0, 0, 0, 1]),
        ({"retired_double_bit": 2}, "nvmlDeviceGetRetiredPages(1)", "NVMLError_NotSupported", [65536, 131072]),
        ({"retired_pending": True}, "nvmlDeviceGetRetiredPagesPendingStatus()", "NVMLError_NotSupported", 1),
        ({"pcie_width": 8}, "nvmlDeviceGetCurrPcieLinkWidth()", 16, 8),
        ({"pcie_generation": 1}, "nvmlDeviceGetCurrPcieLinkGeneration()", 5, 1),
        ({"pcie_replays": 9}, "nvmlDeviceGetPcieReplayCounter()", 0, 9),
        ({"uuid": "GPU-new"}, "nvmlDeviceGetUUID()", "GPU-00000000-0000-0000-0000-000000000000", "GPU-new"),
        ({"serial": "42"}, "nvmlDeviceGetSerial()", "1650123000000", "42"),
        ({"error": 16}, "nvmlDeviceGetSerial()", "1650123000000", "NVMLError_ResetRequired"),
        ({"power": "!999"}, "nvmlDeviceGetPowerUsage()", 75_000, "NVMLError_Unknown"),
    ],
)  # fmt: skip
def test_a_running_process_sees_each_change(
    driver: FakeDriver, reader: Reader, state: dict[str, Any], call: str, before: Any, after: Any
) -> None:
    assert reader.gpu(0, call) == before
    driver.set(0, **state)
    assert reader.gpu(0, call) == after
    driver.set(0, **dict.fromkeys(state))
    assert reader.gpu(0, call) == before
    driver.set(1, **state)
    assert reader.gpu(0, call) == before, "that was another GPU"


def test_structures(driver: FakeDriver, reader: Reader) -> None:
    driver.set(0, utilization_gpu=97, utilization_memory=40, memory_used=3 << 30, processes="71:5368709120 72:1024")
    assert reader.ask(
        "[nvmlDeviceGetUtilizationRates(handles[0]).gpu, nvmlDeviceGetUtilizationRates(handles[0]).memory]"
    ) == [97, 40]
    total, reserved = 150_754_820_096, 653_787_136
    memory = "(m := nvmlDeviceGetMemoryInfo(handles[0]{version})) and [m.total, m.used, m.free]"
    assert reader.ask(memory.format(version="")) == [total, (3 << 30) + reserved, total - reserved - (3 << 30)]
    assert reader.ask(memory.format(version=", nvmlMemory_v2")) == [total, 3 << 30, total - reserved - (3 << 30)]
    assert reader.ask("nvmlDeviceGetMemoryInfo(handles[0], 1)") == "NVMLError_ArgumentVersionMismatch"
    processes = "[[p.pid, p.usedGpuMemory] for p in nvmlDeviceGetComputeRunningProcesses(handles[0])]"
    assert reader.ask(processes) == [[71, 5_368_709_120], [72, 1024]]

    driver.set(0, sram_volatile_uncorrected=3, sram_threshold_exceeded=True)
    assert reader.ask(SRAM) == 0
    assert reader.ask("[s.volatileUncSecDed, s.aggregateUncSecDed, s.bThresholdExceeded]") == [3, 0, 1]


def test_recovery_action_and_other_fields(driver: FakeDriver, reader: Reader) -> None:
    wanted = "[NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, 208]"
    fields = f"[[v.nvmlReturn, v.value.uiVal] for v in nvmlDeviceGetFieldValues(handles[0], {wanted})]"
    assert reader.ask(fields) == [[0, 0], [3, 0]]
    driver.set(0, recovery_action=2, field_208=17)
    assert reader.ask(fields) == [[0, 2], [0, 17]]
    driver.set(0, recovery_action="!3")
    assert reader.ask(fields) == [[3, 0], [0, 17]], "a driver before 570"


def test_a_gpu_falls_off_the_bus(driver: FakeDriver, reader: Reader) -> None:
    driver.lose(2)
    assert reader.gpu(2, "nvmlDeviceGetTemperature(0)") == "NVMLError_GpuIsLost"
    assert reader.gpu(2, "nvmlDeviceGetUUID()") == "NVMLError_GpuIsLost"
    assert reader.ask("nvmlDeviceGetHandleByIndex(2)") == "NVMLError_GpuIsLost"
    assert reader.ask("nvmlDeviceGetCount()") == 4, "it is still counted"
    assert reader.gpu(1, "nvmlDeviceGetTemperature(0)") == 30


def test_a_gpu_without_ecc(driver: FakeDriver, reader: Reader) -> None:
    driver.no_ecc(0)
    assert reader.gpu(0, "nvmlDeviceGetEccMode()") == "NVMLError_NotSupported"
    assert reader.gpu(0, "nvmlDeviceGetTotalEccErrors(1, 0)") == "NVMLError_NotSupported"


def test_fewer_gpus_and_another_driver(driver: FakeDriver, reader: Reader) -> None:
    driver.set(gpus=3, driver_version="535.54.03")
    assert reader.ask("nvmlDeviceGetCount()") == 3
    assert reader.gpu(3, "nvmlDeviceGetTemperature(0)") == "NVMLError_InvalidArgument"
    assert reader.ask("nvmlSystemGetDriverVersion()") == "535.54.03"


def test_the_driver_is_not_loaded(driver: FakeDriver) -> None:
    driver.unload()
    reader = Reader(driver)
    try:
        assert reader.ask("nvmlInit()") == "NVMLError_DriverNotLoaded"
        assert reader.ask("nvmlDeviceGetCount()") == "NVMLError_Uninitialized"
        driver.set(init=None)
        assert reader.ask("nvmlInit()") is None
    finally:
        reader.close()


def test_a_call_hangs_until_it_is_resumed(driver: FakeDriver, reader: Reader) -> None:
    driver.hang(1)
    assert reader.gpu(0, "nvmlDeviceGetTemperature(0)") == 30, "only calls on GPU 1 hang"
    assert reader.ask("nvmlDeviceGetTemperature(handles[1], 0)", seconds=0.5) == "no answer"
    driver.resume(1)
    assert reader.answer(seconds=60) == 30


def test_a_call_hangs_for_some_seconds(driver: FakeDriver, reader: Reader) -> None:
    started = time.monotonic()
    driver.hang(1, seconds=0.6)
    assert reader.gpu(1, "nvmlDeviceGetTemperature(0)") == 30
    assert time.monotonic() - started > 0.5


def test_the_whole_driver_hangs(driver: FakeDriver) -> None:
    driver.hang()
    reader = Reader(driver)
    try:
        assert reader.ask("nvmlInit()", seconds=1) == "no answer"
        driver.resume()
        assert reader.answer(seconds=60) is None
    finally:
        reader.close()


def test_xids_are_delivered_once_to_those_who_wait(driver: FakeDriver, reader: Reader) -> None:
    driver.xid(0, 31)  # before an event set exists
    reader.ask("(events := nvmlEventSetCreate())")
    for index in (0, 1):
        assert reader.ask(f"nvmlDeviceRegisterEvents(handles[{index}], nvmlEventTypeXidCriticalError, events)") is None
    wait = "(e := nvmlEventSetWait(events, {ms})) and [nvmlDeviceGetIndex(e.device), e.eventType, e.eventData]"
    assert reader.ask(wait.format(ms=50)) == "NVMLError_Timeout"

    reader.send(wait.format(ms=10_000))
    assert reader.answer(seconds=0.3) == "no answer"
    driver.xid(1, 79)
    assert reader.answer(seconds=60) == [1, 8, 79]

    driver.xid(3, 48)  # not registered
    driver.event(1, 2, 1)  # nor for double-bit ECC errors
    driver.xid(0, 94)
    assert reader.ask(wait.format(ms=1000)) == [0, 8, 94]
    assert reader.ask(wait.format(ms=50)) == "NVMLError_Timeout"

    driver.lose(1)
    assert reader.ask(wait.format(ms=1000)) == "NVMLError_GpuIsLost"
    assert reader.ask("nvmlEventSetFree(events)") is None


def test_functions_that_an_old_driver_lacks(tmp_path: Path, library: Path) -> None:
    absent = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetRemappedRows")
    old = FakeDriver(tmp_path, library=build(tmp_path, without=absent))
    reader = Reader(old)
    try:
        assert reader.ask("nvmlInit()") is None
        assert reader.ask("(handles := [nvmlDeviceGetHandleByIndex(0)])") is not None
        assert reader.gpu(0, "nvmlDeviceGetCurrentClocksEventReasons()") == "NVMLError_FunctionNotFound"
        assert reader.gpu(0, "nvmlDeviceGetRemappedRows()") == "NVMLError_FunctionNotFound"
        assert reader.gpu(0, "nvmlDeviceGetCurrentClocksThrottleReasons()") == 1
        assert reader.gpu(0, "nvmlDeviceGetBoardPartNumber()") == "NVMLError_FunctionNotFound", "none has it"
    finally:
        reader.close()


def test_it_is_compiled_once(library: Path) -> None:
    compiled = (library / "libnvidia-ml.so.1").stat().st_mtime_ns
    assert build(library.parent) == library
    assert (library / "libnvidia-ml.so.1").stat().st_mtime_ns == compiled
    assert build(library.parent, without=("nvmlDeviceGetRemappedRows",)) != library


def test_a_key_that_is_never_read_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(AssertionError, match="temprature"):
        driver.set(0, temprature=91)
