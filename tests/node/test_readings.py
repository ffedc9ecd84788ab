"""The real pynvml over the fake driver, through the reading process, to the verdict of the table."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.health import Heartbeat, Xid, judge
from opt_ops.core.health.findings import GPU_ROWS, NODE_ROWS, PORT_ROWS
from opt_ops.core.values import Verdict
from opt_ops.node import host
from opt_ops.node.kernel_log import KernelLog
from opt_ops.node.nvml import Probe
from opt_ops.runfolder.heartbeat import heartbeat_of
from tests.fake_nvml.build import FakeDriver, build


def read(driver: FakeDriver, attempt: str | None = None) -> Heartbeat:
    command = [sys.executable, "-m", "opt_ops.node", "readings", "--once"]
    env = {**os.environ, **driver.env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=True)
    where = {"node": "n1", "host": "h", "ts": 1.0, "attempt": attempt, "allocation": "1-n0"}
    return heartbeat_of({**json.loads(done.stdout), **where})


@pytest.fixture
def driver(tmp_path: Path, nvml_library: Path) -> FakeDriver:
    return FakeDriver(tmp_path, gpus=2, library=nvml_library)


# Values of a GPU, the attempt that runs, and the verdict of this one reading.
CASES: list[tuple[dict[str, Any], str | None, Verdict, str]] = [
    ({"recovery_action": 2}, "a", Verdict.BAD, "recovery_action"),
    ({"recovery_action": 1}, "a", Verdict.BAD, "recovery_action"),
    ({"recovery_action": 4, "ecc_volatile_uncorrected": 1}, "a", Verdict.BAD, "recovery_action"),
    ({"recovery_action": 99}, "a", Verdict.BAD, "recovery_action"),
    ({"recovery_action": "!3"}, "a", Verdict.HEALTHY, "ok"),
    ({"error": 15}, "a", Verdict.BAD, "gpu_lost"),
    ({"error": 16}, "a", Verdict.BAD, "reset_required"),
    ({"error": 999}, "a", Verdict.UNKNOWN, "gpu_unreadable"),
    ({"sram_threshold_exceeded": 1}, "a", Verdict.BAD, "sram_threshold"),
    ({"remap_failure": 1}, "a", Verdict.BAD, "remap_failed"),
    ({"remap_uncorrected": 512}, "a", Verdict.BAD, "remapped_rows"),
    ({"remap_uncorrected": 511}, "a", Verdict.HEALTHY, "ok"),
    ({"retired_single_bit": 3, "retired_double_bit": 60}, "a", Verdict.BAD, "retired_pages"),
    ({"retired_single_bit": 3, "retired_double_bit": 59}, "a", Verdict.HEALTHY, "ok"),
    ({"ecc_volatile_uncorrected": 1}, "a", Verdict.BAD, "ecc_uncorrected"),
    ({"ecc_aggregate_uncorrected": 9}, "a", Verdict.HEALTHY, "ok"),
    ({"remap_pending": 1}, "a", Verdict.SUSPECT, "remap_pending"),
    ({"retired_pending": 1}, "a", Verdict.SUSPECT, "retired_pending"),
    ({"sram_aggregate_uncorrected": 5}, "a", Verdict.SUSPECT, "sram_errors"),
    ({"sram_aggregate_uncorrected": 4}, "a", Verdict.HEALTHY, "ok"),
    ({"ecc_volatile_corrected": 50_000_001}, "a", Verdict.SUSPECT, "ecc_corrected"),
    ({"ecc_mode": 0}, "a", Verdict.SUSPECT, "ecc_off"),
    ({"ecc_mode_pending": 0}, "a", Verdict.SUSPECT, "ecc_off"),
    ({"ecc_mode": "!3"}, "a", Verdict.HEALTHY, "ok"),
    ({"clocks_event_reasons": 0x80}, "a", Verdict.SUSPECT, "power_brake"),
    ({"clocks_event_reasons": 0x40}, "a", Verdict.SUSPECT, "thermal_slowdown"),
    ({"clocks_event_reasons": 0x20}, "a", Verdict.SUSPECT, "thermal_slowdown"),
    ({"clocks_event_reasons": 0x8}, "a", Verdict.SUSPECT, "hw_slowdown"),
    ({"clocks_event_reasons": 0x117}, "a", Verdict.HEALTHY, "ok"),
    ({"temperature": 88}, "a", Verdict.SUSPECT, "too_hot"),
    ({"temperature": 87}, "a", Verdict.HEALTHY, "ok"),
    ({"temperature": 200, "threshold_gpu": "!3"}, "a", Verdict.HEALTHY, "ok"),
    ({"field_82": 96}, "a", Verdict.SUSPECT, "memory_too_hot"),
    ({"field_82": 95}, "a", Verdict.HEALTHY, "ok"),
    ({"field_82": 200, "threshold_memory": "!3"}, "a", Verdict.HEALTHY, "ok"),
    ({"fabric_state": 1}, "a", Verdict.SUSPECT, "fabric"),
    ({"fabric_state": 2}, "a", Verdict.SUSPECT, "fabric"),
    ({"fabric_state": 3}, "a", Verdict.HEALTHY, "ok"),
    ({"fabric_state": 3, "fabric_status": 999}, "a", Verdict.SUSPECT, "fabric"),
    ({"fabric_state": 3, "fabric_health": 0b01}, "a", Verdict.SUSPECT, "fabric"),
    ({"fabric_state": 3, "fabric_health": 0b10}, "a", Verdict.HEALTHY, "ok"),
    ({"ecc_aggregate_uncorrected": 16}, "a", Verdict.HEALTHY, "ecc_aggregate"),
    ({"nvlink_7": 0}, "a", Verdict.SUSPECT, "nvlink_down"),
    ({"pcie_width": 8, "utilization_gpu": 99}, "a", Verdict.SUSPECT, "pcie_width"),
    ({"pcie_width": 8, "utilization_gpu": 99}, None, Verdict.HEALTHY, "ok"),
    ({"pcie_width": 8, "utilization_gpu": 0}, "a", Verdict.HEALTHY, "ok"),
    ({"pcie_generation": 1, "utilization_gpu": 99}, "a", Verdict.HEALTHY, "pcie_generation"),
    ({"pcie_generation": 1, "utilization_gpu": 0}, "a", Verdict.HEALTHY, "ok"),
    ({"processes": "71:1024"}, None, Verdict.SUSPECT, "left_over"),
    ({"memory_used": 600 << 20}, None, Verdict.SUSPECT, "left_over"),
    ({"memory_used": 600 << 20, "processes": "71:1024"}, "a", Verdict.HEALTHY, "ok"),
    ({"memory_used": 500 << 20}, None, Verdict.HEALTHY, "ok"),
    ({"persistence_mode": 0}, None, Verdict.HEALTHY, "persistence_off"),
]

IN_TIME = {"gpu_changed", "nvlink_errors", "pcie_replays", "port_flaps", "port_down", "gpu_missing", "disk_low"}
IN_TIME |= {"mount_lost", "mount_read_only", "carrier_lost", "clock_unset"}
"""Rows that need several readings or no GPU. Their tests are here and in tests/core/health/test_health.py."""


@pytest.mark.parametrize(("says", "attempt", "verdict", "reason"), CASES)
def test_each_row_of_the_table_through_pynvml(
    driver: FakeDriver, says: dict[str, Any], attempt: str | None, verdict: Verdict, reason: str
):
    driver.set(1, **says)
    judgement = judge(read(driver, attempt), 2)
    assert (judgement.verdict, judgement.reason) == (verdict, reason), judgement
    if reason != "ok":
        assert judgement.evidence["index"] == 1
        assert judgement.evidence["verb"]


def test_no_row_is_without_a_test():
    assert {row.reason for row in (*GPU_ROWS, *PORT_ROWS, *NODE_ROWS)} == {case[3] for case in CASES} - {"ok"} | IN_TIME


def test_a_card_without_nvlink_has_none_down(driver: FakeDriver):
    for gpu in (0, 1):
        driver.set(gpu, nvlinks=0)
    reading = read(driver)
    assert [gpu.nvlinks for gpu in reading.gpus] == [None, None]
    assert judge(reading, 2).reason == "ok"


def test_nvlink_errors_are_counted_as_old_and_new_cards_count_them(driver: FakeDriver):
    driver.set(0, field_52=3, field_59=4)
    driver.set(1, field_215=1)
    assert [gpu.nvlink_errors for gpu in read(driver).gpus] == [7, 18]


def test_an_old_driver_is_unknown_in_part_and_not_bad(tmp_path: Path):
    absent = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetRemappedRows", "nvmlDeviceGetNvLinkState")
    absent += ("nvmlDeviceGetSramEccErrorStatus", "nvmlEventSetCreate")
    old = FakeDriver(tmp_path, gpus=1, library=build(tmp_path, without=absent))
    old.set(0, recovery_action="!3")
    (gpu,) = read(old).gpus
    assert (gpu.remap_pending, gpu.nvlinks, gpu.sram_over_threshold, gpu.recovery_action) == (None, None, None, None)
    assert gpu.throttle == 1, "by its older name"
    assert judge(read(old), 1).reason == "ok"


def test_a_gpu_that_the_driver_counts_no_more_is_lost(driver: FakeDriver, tmp_path: Path):
    probe = started(driver, tmp_path)
    try:
        assert len(until(probe, lambda reading: reading["nvml"] == "ok")["gpus"]) == 2
        driver.set(gpus=1)
        lost = until(probe, lambda reading: "error" in reading["gpus"][1])
        beat = heartbeat_of({"node": "n1", "host": "h", "ts": 1.0, **lost})
        assert judge(beat, 2).reason == "gpu_lost"
        assert beat.gpus[1].serial == "1650123000001"
    finally:
        probe.close()


def started(driver: FakeDriver, folder: Path, deadline: float = 300.0) -> Probe:
    """A probe whose process sees the fake driver."""
    before = dict(os.environ)
    os.environ.update(driver.env)
    try:
        probe = Probe(0.1, deadline)
        probe.latest()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return probe


def until(probe: Probe, wanted: Any, seconds: float = 300.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        reading = probe.latest()
        if reading is not None and wanted(reading):
            return reading
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {reading}")


def test_xids_come_as_events_where_the_kernel_log_is_closed_to_us(driver: FakeDriver, tmp_path: Path):
    probe = started(driver, tmp_path)
    try:
        until(probe, lambda reading: reading["nvml"] == "ok")
        driver.xid(1, 79)
        driver.xid(0, 48)
        seen: list[dict[str, Any]] = []
        until(probe, lambda _: seen.extend(probe.xids()) or len(seen) == 2)
        assert [(xid["code"], xid["pci"]) for xid in seen] == [(79, "0000:2b:00"), (48, "0000:1b:00")]
        beat = heartbeat_of({"node": "n1", "host": "h", "ts": 1.0, "nvml": "ok", "gpus": [], "xids": seen})
        assert judge(beat, 0).reason == "xid_79"
        assert probe.xids() == [], "each is reported once"
    finally:
        probe.close()


def test_a_hung_call_is_unknown(driver: FakeDriver, tmp_path: Path):
    driver.hang(1)
    probe = started(driver, tmp_path, deadline=1.0)
    try:
        hung = until(probe, lambda reading: reading["nvml"] == "hung")
        judgement = judge(heartbeat_of({"node": "n1", "host": "h", "ts": 1.0, **hung}), 2)
        assert (judgement.verdict, judgement.reason) == (Verdict.UNKNOWN, "nvml_hung")
    finally:
        probe.close()


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 259:2 / / rw,relatime - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
31 27 0:44 / /checkpoints rw,relatime shared:5 - lustre 10.0.0.1@o2ib:/ckpt rw,flock
32 27 0:45 / /data\\040sets ro,relatime shared:6 - nfs4 10.0.0.2:/data rw,vers=4.2
33 27 0:46 / /home rw,relatime shared:7 - autofs /etc/auto.home rw,fd=7
34 33 0:47 / /home/ann rw,relatime shared:8 - nfs4 10.0.0.2:/home/ann rw,vers=4.2
35 27 259:3 / /scratch rw,relatime shared:9 - xfs /dev/nvme1n1 ro,attr2
36 27 0:48 / /var/lib/docker/overlay2/a rw,relatime - ext4 /dev/nvme0n1p2 rw
"""


def test_the_host_by_recorded_trees(tmp_path: Path):
    for name, state, downed in (("mlx5_0", "4: ACTIVE", "7"), ("mlx5_1", "1: DOWN", None)):
        port = tmp_path / "infiniband" / name / "ports" / "1"
        (port / "counters").mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        if downed:
            (port / "counters/link_downed").write_text(f"{downed}\n")
    for name, kind, device in (("eth0", "1", True), ("ib0", "32", True), ("docker0", "1", False)):
        adapter = tmp_path / "net" / name
        adapter.mkdir(parents=True)
        (adapter / "type").write_text(f"{kind}\n")
        (adapter / "carrier_down_count").write_text("3\n")
        if device:
            (adapter / "device").mkdir()
    (tmp_path / "mountinfo").write_text(MOUNTS)
    said = host.read(tmp_path, sysfs=tmp_path, mounts=tmp_path / "mountinfo")
    assert said["ports"] == [
        {"name": "mlx5_0/1", "active": True, "downed": 7},
        {"name": "mlx5_1/1", "active": False, "downed": None},
    ]
    assert said["carriers"] == {"eth0": 3}, "neither a bridge nor InfiniBand"
    assert said["mounts"] == {"/": True, "/checkpoints": True, "/data sets": False, "/scratch": False}
    assert said["clock_set"] in (True, False, None)
    assert 0 < said["disk_free"] <= said["disk_size"]
    none = host.read(tmp_path / "none", sysfs=tmp_path / "none", mounts=tmp_path / "none")
    assert {**none, "clock_set": None} == {
        "ports": [],
        "carriers": {},
        "mounts": None,
        "clock_set": None,
        "disk_free": None,
        "disk_size": None,
    }


# Records of /dev/kmsg, one for each read.
RECORDS = (
    "6,1201,{old},-;NVRM: Xid (PCI:0000:1b:00): 119, pid=71, Timeout waiting for RPC from GSP",
    "6,1202,{new},-;NVRM: Xid (PCI:0000:2B:00): 79, pid='<unknown>', GPU has fallen off the bus.\n SUBSYSTEM=pci\n",
    "6,1203,{new},-;nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up",
    "6,1204,{new},-;usb 1-1: new high-speed USB device",
)


def test_the_kernel_log_of_the_last_hours():
    reader, writer = os.pipe2(os.O_DIRECT)  # one record a read, as /dev/kmsg
    up = time.monotonic()  # however long: the log begins with the machine
    for record in RECORDS:
        os.write(writer, record.format(old=0, new=int(1e6 * up / 2)).encode())
    log = KernelLog(f"/proc/self/fd/{reader}", since=time.time() - 0.75 * up)
    seen = log.xids()
    assert [(xid["code"], xid["pci"], xid["switch"]) for xid in seen] == [
        (79, "0000:2b:00", False),
        (20034, "0000:06:00.0", True),
    ]
    assert time.time() - seen[0]["at"] == pytest.approx(time.monotonic() - up / 2, abs=min(60, up / 8))
    assert log.xids() == []
    os.close(reader)
    os.close(writer)


def test_an_xid_names_the_gpu_that_it_is_of(driver: FakeDriver):
    reading = read(driver)
    assert [gpu.pci for gpu in reading.gpus] == ["0000:1b:00", "0000:2b:00"]
    fallen = Xid(code=79, pci="0000:2b:00", line="NVRM: Xid (PCI:0000:2b:00): 79, …", at=1.0)
    evidence = judge(replace(reading, xids=(fallen,)), 2).evidence
    assert (evidence["xid"], evidence["index"], evidence["serial"]) == (79, 1, "1650123000001")
    gone = judge(replace(reading, xids=(replace(fallen, pci="0000:ff:00"),)), 2).evidence
    assert "uuid" not in gone


def test_what_a_fleet_is_compared_by(driver: FakeDriver):
    driver.set(1, vbios_version="95.00", clock_max_sm=1500, inforom_version="G000")
    reading = read(driver)
    assert reading.driver == "570.124.06"
    assert [(gpu.vbios, gpu.clock_most) for gpu in reading.gpus] == [("96.00.A0.00.01", 1980), ("95.00", 1500)]
    assert [gpu.inforom for gpu in reading.gpus] == ["G525.0225.00.05", "G000"]


def test_a_nodes_energy_is_the_sum_of_its_gpus_counters(driver: FakeDriver):
    driver.set(0, energy=5_000_000)
    assert read(driver).energy_joules == 5_000 + 1_000
    driver.set(1, energy="!3")
    assert read(driver).energy_joules is None, "one that does not tell its own"
