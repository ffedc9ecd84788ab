"""A process that prints lines for the agent: whatever it prints and however it ends, the agent goes on and says so."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.node.line_process import CRASHED, HUNG, LONGEST_LINE, OK, STARTING, LineProcess, in_child, parsed
from opt_ops.node.nvml import Probe
from opt_ops.node.reading import reading_of
from tests.fake_nvml.build import FakeDriver

DEADLINE = 20.0


class Clock:
    """Virtual seconds: the process is real, the waiting is not."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def any_object(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[LineProcess, Clock]]]:
    processes: list[LineProcess] = []

    def start(code: str, deadline: float = DEADLINE) -> tuple[LineProcess, Clock]:
        clock = Clock()
        processes.append(LineProcess([sys.executable, "-c", code], deadline, any_object, clock))
        return processes[-1], clock

    yield start
    for process in processes:
        process.close()


def until(wanted: Callable[[], Any], seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := wanted()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return value


def dead(process: LineProcess) -> bool:
    """Let the process that runs now end, and be seen to have ended."""
    process.read()
    return process._process is None


def test_three_deaths_are_a_crash_and_restarts_are_not_many(started):
    process, clock = started("raise SystemExit(3)")
    for second in range(300):
        until(lambda: dead(process) or clock() < process._started_at)
        clock.now += 0.1
        if second == 29:
            assert process.state in (STARTING, CRASHED)
        if process.starts >= 3 and process._process is None:
            assert process.state == CRASHED
    assert clock.now == pytest.approx(130.0)
    assert 3 <= process.starts <= 6, "in 30 s"
    assert process.newest is None


def test_after_good_lines_a_dead_process_gives_no_old_line(started, tmp_path: Path):
    once = f"import os; p={str(tmp_path / 'x')!r}; e=os.path.exists(p); open(p, 'w'); e or print('{{}}')"
    process, clock = started(f"{once}; raise SystemExit(1)")
    until(lambda: process.read() or process.newest is not None)
    until(lambda: dead(process))
    assert process.newest == {}
    for _ in range(int(DEADLINE) + 1):
        clock.now += 1.0
        until(lambda: dead(process))
    assert (process.state, process.newest) == (CRASHED, None)
    assert process.age == pytest.approx(DEADLINE + 1)


def test_a_process_that_heals_is_read_again(started, tmp_path: Path):
    well = tmp_path / "well"
    code = f"import os, time\nif not os.path.exists({str(well)!r}): raise SystemExit(1)\n"
    code += "while True: print('{}', flush=True); time.sleep(0.01)"
    process, clock = started(code)
    while process.state != CRASHED:
        until(lambda: dead(process))
        clock.now += 1.0
    well.touch()
    clock.now += 60.0
    until(process.read)
    assert process.state == CRASHED, "one line is no recovery"
    clock.now += 11.0
    until(process.read)
    assert process.state == OK


def test_a_start_is_no_sign_of_life(started):
    process, clock = started("import time; time.sleep(600)")
    process.read()
    for _ in range(5):
        clock.now += DEADLINE + 1
        process.read()
        assert process.state == HUNG
        until(lambda: process._started_at == clock() or process.read())
    assert process.starts == 6


@pytest.mark.parametrize(
    ("chatter", "left_out"),
    [
        ("print('hello')", 1),
        ("print('[1, 2]'); print('null'); print('7'); print('\"x\"')", 4),
        ("print('[' * 100000)", 1),
        ("print('{\"a\":' * 100000)", 1),
        ("print('{\"a\": NaN}'); print('{\"a\": 1e999}'); print('{\"a\": -Infinity}')", 3),
        (f"print('x' * {3 * LONGEST_LINE})", 1),
        ("sys.stdout.buffer.write(bytes(range(256)) + b'\\n')", 2),
        ("print('9' * 100000)", 1),
    ],
)
def test_chatter_is_left_out_and_counted(started, chatter: str, left_out: int):
    process, _ = started(f"import sys, time; {chatter}; print('{{\"a\": 1}}', flush=True); time.sleep(600)")
    until(lambda: process.read() or process.newest)
    assert process.newest == {"a": 1}
    assert process.left_out == left_out


def test_output_without_end_is_bounded(started):
    process, _ = started("import os\nwhile True: os.write(1, b'x' * 65536)")
    for _ in range(20):
        process.read()
        assert len(process._buffer) <= LONGEST_LINE + 65536
        time.sleep(0.01)
    assert process.left_out <= 1


def test_a_program_that_is_not_there_is_a_crash(capfd: pytest.CaptureFixture[str]):
    clock = Clock()
    process = LineProcess(["/no/such/program"], DEADLINE, any_object, clock)
    for _ in range(10):
        process.read()
        clock.now += 1.0
    assert process.state == CRASHED
    assert "cannot be started" in capfd.readouterr().err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
GOOD = {
    "nvml": "ok",
    "driver": "570.124.06",
    "gpus": [{"index": 0, "uuid": "GPU-1", "temperature": 30, "power_watts": 75.5, "ecc_on": True}],
    "xid_events": [{"code": 79, "pci": "0000:1b:00", "line": "NVML event", "at": 1.0}],
}


@given(st.sampled_from(["nvml", "driver", "gpus", "xid_events", "new"]), JSON, st.sampled_from(["index", "uuid", "at"]))
def test_any_value_in_any_field_of_a_reading(field: str, value: Any, inner: str):
    gpu, event = {**GOOD["gpus"][0], inner: value}, {**GOOD["xid_events"][0], inner: value}
    for made in ({**GOOD, field: value}, {**GOOD, "gpus": [gpu, value], "xid_events": [event, value]}, value):
        reading = parsed(json.dumps(made).encode(), reading_of)
        if reading is not None:
            assert reading.keys() == GOOD.keys()
            assert all(isinstance(each["index"], int) for each in reading["gpus"])
            json.dumps(reading, allow_nan=False)


def test_a_call_in_a_process_of_its_own():
    assert in_child(lambda: {"a": 1}, 60.0, any_object) == {"a": 1}
    assert in_child(lambda: os._exit(9), 60.0, any_object) == CRASHED
    assert in_child(lambda: [1], 60.0, any_object) == CRASHED
    assert in_child(lambda: time.sleep(600), 0.2, any_object) == HUNG


# ---- the NVML process over a library that misbehaves


def probe_of(driver: FakeDriver, deadline: float = 300.0) -> Probe:
    before = dict(os.environ)
    os.environ.update(driver.env)
    try:
        probe = Probe(0.05, deadline)
        probe.latest()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return probe


def reading(probe: Probe, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        latest = probe.latest()
        return latest if latest is not None and wanted(latest) else None

    return until(found)


@pytest.fixture
def driver(tmp_path: Path, nvml_library: Path) -> FakeDriver:
    return FakeDriver(tmp_path, gpus=2, library=nvml_library)


@pytest.mark.parametrize("call", [1, 2, 4, 30, 111])
def test_a_library_that_ends_its_process_at_a_call(driver: FakeDriver, call: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", driver.env["LD_LIBRARY_PATH"])  # for the restarts
    monkeypatch.setenv("FAKE_NVML_STATE", driver.env["FAKE_NVML_STATE"])
    driver.set(dies_at=call)
    probe = probe_of(driver)
    try:
        assert reading(probe, lambda found: found["nvml"] == "crashed")["gpus"] == []
        if call == 30:
            driver.set(dies_at=None)
            assert len(reading(probe, lambda found: found["nvml"] == "ok")["gpus"]) == 2
    finally:
        probe.close()


@pytest.mark.parametrize("call", [1, 3, 50])
def test_a_library_that_hangs_at_a_call(driver: FakeDriver, call: int):
    driver.set(hangs_at=call)
    probe = probe_of(driver, deadline=2.0)
    try:
        assert reading(probe, lambda found: found["nvml"] == "hung")["gpus"] == []
    finally:
        probe.close()


@pytest.mark.parametrize("fault", [{"dies_at": 20}, {"chatters": 1}])
def test_one_reading_for_a_command(driver: FakeDriver, fault: dict[str, int]):
    driver.set(**fault)
    command = [sys.executable, "-m", "opt_ops.node", "readings", "--once"]
    done = subprocess.run(command, env={**os.environ, **driver.env}, capture_output=True, timeout=240, check=True)
    said = json.loads(done.stdout)
    assert said["nvml"] == ("crashed" if "dies_at" in fault else "ok")
    assert said["machine"]["disk_size"], "the host and the kernel log are read all the same"
    assert said["xids"] == []


def test_what_a_library_prints_is_not_in_the_readings(driver: FakeDriver):
    driver.set(chatters=1)
    probe = probe_of(driver)
    try:
        assert len(reading(probe, lambda found: found["nvml"] == "ok")["gpus"]) == 2
        assert probe.left_out == 0
    finally:
        probe.close()


def test_names_that_are_not_utf8_are_null_and_the_reading_comes(driver: FakeDriver):
    broken = b"\xfe\xff\x80NVIDIA".decode(errors="surrogateescape")
    for each in (Path(__file__).with_name("data") / "nvml.state.add").read_bytes().splitlines():
        gpu, _, rest = each.partition(b".")
        key, _, value = rest.partition(b"=")
        driver.set(int(gpu), **{key.decode(): value.decode(errors="surrogateescape")})
    driver.set(1, vbios_version=broken, inforom_version=broken, serial=broken)
    driver.set(driver_version=broken)
    probe = probe_of(driver)
    try:
        found = reading(probe, lambda found: found["nvml"] == "ok")
        first, second = found["gpus"]
        assert (first["name"], first["uuid"], first["serial"]) == (None, None, "1650123000000")
        assert (second["name"], second["vbios"], second["inforom"], second["serial"]) == (
            "NVIDIA H200",
            None,
            None,
            None,
        )
        assert found["driver"] is None
        assert "error" not in first
    finally:
        probe.close()


def test_a_library_that_counts_wrong_is_said(driver: FakeDriver):
    driver.set(gpus=4_000_000_000)
    probe = probe_of(driver)
    try:
        assert reading(probe, lambda found: found["nvml"] != "starting")["nvml"] == "implausible_count"
    finally:
        probe.close()


def test_a_gpu_that_cannot_be_found_is_lost_and_the_others_are_read(driver: FakeDriver):
    driver.lose(0)
    probe = probe_of(driver)
    try:
        lost, other = reading(probe, lambda found: found["nvml"] == "ok")["gpus"]
        assert (lost["error"], other["name"]) == ("gpu_is_lost", "NVIDIA H200")
    finally:
        probe.close()
