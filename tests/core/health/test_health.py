"""Readings to verdicts: the worst row that applies wins, and what cannot be read is unknown."""

from dataclasses import replace

import pytest

from opt_ops.core.events import Entry, NodeJudged
from opt_ops.core.health import (
    HEALTH_TABLE,
    EvaluationReport,
    Gpu,
    Heartbeat,
    History,
    Judgement,
    Machine,
    Port,
    Verb,
    Xid,
    differing,
    judge,
    remember,
)
from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest
from opt_ops.core.health.burn_in_plan import GroupMeasurement
from opt_ops.core.health.nvlink import Cause
from opt_ops.core.health.recurrence import remembered
from opt_ops.core.health.table import judgement as said_by
from opt_ops.core.health.xids import SXIDS_BY_GROUP, XID_VERBS, came_again, row_of, xid_row
from opt_ops.core.values import Verdict
from opt_ops.node.kernel_log import parse_xid

GPU = Gpu(index=0, uuid="GPU-1", serial="123", ecc_uncorrected=0, remap_pending=False, remap_failed=False)
NODE = Heartbeat(node="n1", host="n1", ts=0.0, attempt=None, nvml="ok", gpus=(GPU, replace(GPU, index=1)))


def with_gpu(**changes: object) -> Heartbeat:
    return replace(NODE, gpus=(GPU, replace(GPU, index=1, **changes)))


def xid(code: int, drill: str | None = None) -> Xid:
    line = f"NVRM: Xid (PCI:0000:3b:00): {code}, pid=1"
    return Xid(code=code, pci="0000:3b:00", line=line, at=0.0, drill=drill)


def test_a_node_of_which_everything_is_well_is_healthy():
    assert (judge(NODE, 2).verdict, judge(NODE, 2).reason) == (Verdict.HEALTHY, "ok")


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        ({"error": "gpu_is_lost"}, Verdict.BAD, "gpu_lost"),
        ({"error": "reset_required"}, Verdict.BAD, "reset_required"),
        ({"error": "unknown"}, Verdict.UNKNOWN, "gpu_unreadable"),
        ({"recovery_action": "gpu_reset"}, Verdict.BAD, "recovery_action"),
        ({"recovery_action": "none"}, Verdict.HEALTHY, "ok"),
        ({"recovery_action": None}, Verdict.HEALTHY, "ok"),
        ({"ecc_uncorrected": 1}, Verdict.BAD, "ecc_uncorrected"),
        ({"ecc_uncorrected": None}, Verdict.HEALTHY, "ok"),
        ({"remap_failed": True}, Verdict.BAD, "remap_failed"),
        ({"remap_pending": True}, Verdict.SUSPECT, "remap_pending"),
    ],
)
def test_each_row_of_the_table(changes: dict, verdict: Verdict, reason: str):
    judgement = judge(with_gpu(**changes), 2)
    assert (judgement.verdict, judgement.reason) == (verdict, reason)
    assert judgement.source
    if verdict in (Verdict.BAD, Verdict.SUSPECT):
        assert judgement.evidence["serial"] == "123", "bad parts are remembered by serial, not by host"


def test_the_worst_row_wins():
    assert judge(with_gpu(remap_pending=True, ecc_uncorrected=3), 2).reason == "ecc_uncorrected"


@pytest.mark.parametrize("nvml", ["absent", "hung", "driver_not_loaded"])
def test_a_node_that_cannot_be_read_is_unknown_never_healthy_and_never_bad(nvml: str):
    blind = replace(NODE, nvml=nvml, gpus=())
    for expected in (0, 8):
        assert (judge(blind, expected).verdict, judge(blind, expected).reason) == (Verdict.UNKNOWN, f"nvml_{nvml}")


def test_a_gpu_fewer_than_there_should_be_is_bad():
    judgement = judge(NODE, 8)
    assert (judgement.verdict, judgement.reason) == (Verdict.BAD, "gpu_missing")
    assert (judgement.evidence["expected"], judgement.evidence["found"]) == (8, 2)


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (79, Verdict.BAD),  # RESTART_BM: fallen off the bus
        (48, Verdict.BAD),  # double-bit error
        (64, Verdict.BAD),  # row remap failure
        (95, Verdict.BAD),  # uncontained ECC
        (119, Verdict.BAD),  # GSP timeout
        (63, Verdict.HEALTHY),  # row remap event: logged
        (13, Verdict.HEALTHY),  # the application's fault
        (31, Verdict.HEALTHY),
        (94, Verdict.HEALTHY),  # contained: the application restarts
        (154, Verdict.SUSPECT),  # a workflow, not a verb
        (999, Verdict.SUSPECT),  # nobody knows it
    ],
)
def test_xids_follow_nvidias_catalogue(code: int, verdict: Verdict):
    assert judge(replace(NODE, xids=(xid(code),)), 2).verdict is verdict


def test_an_xid_counts_on_a_node_without_nvml_and_keeps_its_drill():
    blind = replace(NODE, nvml="absent", gpus=(), xids=(xid(79, drill="d001"),))
    judgement = judge(blind, 0)
    assert (judgement.verdict, judgement.reason, judgement.drill) == (Verdict.BAD, "xid_79", "d001")
    assert "Xid" in judgement.evidence["line"]


def test_no_xid_has_two_verbs():
    from opt_ops.core.health.xids import _XIDS_BY_VERB

    assert sum(len(codes) for codes in _XIDS_BY_VERB.values()) == len(XID_VERBS)
    assert XID_VERBS[79] is Verb.REBOOT_NODE


# ---- lines of the kernel log


def logged(line: str, at: float = 0.0) -> Xid:
    code, pci, switch = parse_xid(line)
    return Xid(code=code, pci=pci, line=line, at=at, switch=switch)


RECOVERY = "NVRM: Xid (PCI:0000:3b:00): 154, GPU recovery action changed from 0x0 (None) to"


@pytest.mark.parametrize(
    ("line", "verdict", "verb"),
    [
        (f"{RECOVERY} 0x1 (GPU Reset Required)", Verdict.BAD, Verb.RESET_GPU),
        (f"{RECOVERY} 0x2 (Node Reboot Required)", Verdict.BAD, Verb.REBOOT_NODE),
        (f"{RECOVERY} 0x2 (OS Reboot)", Verdict.BAD, Verb.REBOOT_NODE),
        (f"{RECOVERY} 0x3 (Drain P2P)", Verdict.BAD, Verb.RESET_GPU),
        (f"{RECOVERY} 0x4 (Drain and Reset)", Verdict.BAD, Verb.RESET_GPU),
        (f"{RECOVERY} 0x0 (None)", Verdict.HEALTHY, Verb.NONE),
        (f"{RECOVERY} 0x63 (Something new)", Verdict.SUSPECT, Verb.ISOLATE),
        ("NVRM: Xid (PCI:0000:04:00): 144, SAW_MVB Nonfatal XC0 i0 Link 00", Verdict.HEALTHY, Verb.NONE),
        ("NVRM: Xid (PCI:0000:04:00): 145, RLW_REMAP Fatal XC0 i0 Link 00", Verdict.BAD, Verb.RESET_GPU),
        (
            "NVRM: Xid (PCI:0000:04:00): 149, NETIR_LINK_EVT/NETIR_LINK_DOWN Fatal XC0 i0 Link 00 (0x02500011 0x0)",
            *(Verdict.BAD, Verb.RESET_GPU),
        ),
        ("NVRM: Xid (PCI:0000:04:00): 150", Verdict.SUSPECT, Verb.NONE),
        ("nvidia-nvswitch: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up", Verdict.BAD, Verb.RESET_GPU),
        ("nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Non-fatal, Link 48 LTSSM", Verdict.HEALTHY, Verb.NONE),
        ("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 12028, Non-fatal, Link 32 egress", Verdict.BAD, Verb.RESET_GPU),
        ("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 22003, Fatal, Link 0 Minion Halt", Verdict.BAD, Verb.REBOOT_NODE),
        ("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 20012, Non-fatal, Link 3", Verdict.SUSPECT, Verb.ISOLATE),
        ("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 11012, Non-fatal, Link 3", Verdict.HEALTHY, Verb.NONE),
        ("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 31999, Fatal, Link 3", Verdict.BAD, Verb.RESET_GPU),
        ("NVRM: Xid (PCI:0000:3b:00): 45, pid=1, name=python, Ch 00000008", Verdict.HEALTHY, Verb.NONE),
        ("NVRM: Xid (PCI:0000:3b:00): 74, pid=1, NVLink: fatal error on link 2", Verdict.SUSPECT, Verb.RESET_GPU),
        ("NVRM: Xid (PCI:0000:3b:00): 168, pid=1", Verdict.BAD, Verb.REBOOT_NODE),
        ("NVRM: Xid (PCI:0000:3b:00): 1, pid=1", Verdict.SUSPECT, Verb.ISOLATE),
        ("NVRM: Xid (PCI:0000:3b:00): 171, pid=1", Verdict.HEALTHY, Verb.NONE),
    ],
)  # fmt: skip
def test_workflows_follow_the_line_not_the_code_alone(line: str, verdict: Verdict, verb: Verb):
    judgement = judge(replace(NODE, xids=(logged(line),)), 2)
    assert (judgement.verdict, judgement.evidence["verb"]) == (verdict, verb)
    assert judgement.evidence["table"] == HEALTH_TABLE


def test_the_drivers_wish_outranks_single_xids():
    both = (logged("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."), logged(f"{RECOVERY} 0x1 (Reset)"))
    assert judge(replace(NODE, xids=both), 2).reason == "xid_154"
    wish = replace(with_gpu(recovery_action="node_reboot"), xids=both)
    assert (judge(wish, 2).reason, judge(wish, 2).evidence["verb"]) == ("recovery_action", Verb.REBOOT_NODE)
    nothing = (both[0], logged(f"{RECOVERY} 0x0 (None)"))
    assert judge(replace(NODE, xids=nothing), 2).reason == "xid_79", "none acquits nothing"


def test_48_alone_is_isolated_and_with_a_remap_reset():
    assert judge(replace(NODE, xids=(xid(48),)), 2).evidence["verb"] == Verb.ISOLATE
    assert judge(replace(NODE, xids=(xid(48), xid(63))), 2).evidence["verb"] == Verb.RESET_GPU
    elsewhere = replace(xid(63), pci="0000:4b:00")
    assert judge(replace(NODE, xids=(xid(48), elsewhere)), 2).evidence["verb"] == Verb.ISOLATE


@pytest.mark.parametrize(
    ("code", "seconds", "verdict", "verb"),
    [
        (94, 3600, Verdict.SUSPECT, Verb.ISOLATE),
        (94, 30, Verdict.HEALTHY, Verb.RESTART_APP),  # a burst is one event
        (94, 8 * 86400, Verdict.HEALTHY, Verb.RESTART_APP),
        (13, 3600, Verdict.HEALTHY, Verb.RESTART_APP),  # an application may fail as often as it likes
        (119, 3600, Verdict.BAD, Verb.ISOLATE),
        (63, 3600, Verdict.HEALTHY, Verb.NONE),
    ],
)
def test_an_error_that_comes_again_on_the_same_gpu_asks_for_more(
    code: int, seconds: float, verdict: Verdict, verb: Verb
):
    both = (xid(code), replace(xid(code), at=float(seconds)))
    judgement = said_by(row_of(both[1], both), {}, came_again(both[1], both))
    assert (judgement.verdict, judgement.evidence["verb"]) == (verdict, verb)
    assert judge(replace(NODE, xids=both), 2).verdict is verdict


def test_the_unit_of_an_nvlink5_error_is_in_the_evidence():
    line = "NVRM: Xid (PCI:0000:04:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 00 (0x02500011 0x00000000 0x0 0x0)"
    assert judge(replace(NODE, xids=(logged(line),)), 2).evidence["subunit"] == 0x25


def test_every_listed_code_has_one_row_with_a_source():
    for code in range(1, 173):
        row = xid_row(code)
        assert (row.reason, bool(row.source)) == (f"xid_{code}", True)
    codes = [code for codes in SXIDS_BY_GROUP.values() for code in codes]
    assert len(codes) == len(set(codes)) > 80


# ---- what only several readings show


class Watched:
    """A node whose heartbeats come every two seconds."""

    def __init__(self) -> None:
        self.history = History()
        self.ts = 1000.0

    def see(self, times: int = 1, seconds: float = 2.0, **changes: object) -> Judgement:
        for _ in range(times):
            self.ts += seconds
            beat = replace(NODE, ts=self.ts, attempt="a", allocation="1-n0", **changes)
            self.history = remember(self.history, beat, 2)
        return judge(beat, 2, self.history)

    def gpu(self, times: int = 1, seconds: float = 2.0, **changes: object) -> Judgement:
        return self.see(times, seconds, gpus=(GPU, replace(GPU, index=1, uuid="GPU-2", **changes)))


def test_what_must_be_seen_in_a_row_counts_only_then():
    node = Watched()
    assert node.gpu(29, throttle=0x40).reason == "ok"
    assert node.gpu(1, throttle=0x1).reason == "ok"
    assert node.gpu(29, throttle=0x40).reason == "ok", "the row was broken"
    assert node.gpu(1, throttle=0x40).reason == "thermal_slowdown"
    assert node.gpu(1, throttle=0x1).reason == "ok"


def test_what_cannot_be_read_neither_confirms_nor_acquits():
    node = Watched()
    node.gpu(29, throttle=0x40)
    assert node.gpu(5, throttle=None).reason == "ok"
    assert node.see(1, nvml="hung", gpus=()).reason == "nvml_hung"
    assert node.gpu(1, throttle=0x40).reason == "thermal_slowdown"


def test_a_reset_that_did_not_last_ends_in_isolation():
    node = Watched()
    assert node.gpu(ecc_uncorrected=1).evidence["verb"] == Verb.RESET_GPU
    node.gpu(100, ecc_uncorrected=1)
    assert node.gpu(ecc_uncorrected=1).evidence["verb"] == Verb.RESET_GPU, "it is still the same"
    node.gpu(ecc_uncorrected=0)
    assert node.gpu(ecc_uncorrected=1, seconds=86400.0).evidence["verb"] == Verb.ISOLATE
    node.gpu(ecc_uncorrected=0)
    assert node.gpu(ecc_uncorrected=1, seconds=8 * 86400.0).evidence["verb"] == Verb.RESET_GPU, "long ago"


def test_pcie_replays_count_by_rate_lanes_and_generation():
    node = Watched()
    link = {"pcie_width": 16, "pcie_generation": 5}  # 1.92 × 16, rounded up: 31 a minute
    for minute in range(1, 4):
        assert node.gpu(30, pcie_replays=1_000_000 + 31 * minute, **link).reason == "ok"
    for minute in range(1, 4):
        last = node.gpu(30, pcie_replays=2_000_000 + 40 * minute, **link)
    assert last.reason == "pcie_replays"
    assert node.gpu(60, pcie_replays=5, **link).reason == "ok", "a counter that begins again is no rate"


def test_nvlink_errors_count_by_rate_and_never_by_total():
    node = Watched()
    assert node.gpu(400, nvlink_errors=12345).reason == "ok"
    for minute in range(1, 8):
        last = node.gpu(30, nvlink_errors=12345 + minute)
    assert last.reason == "nvlink_errors"


def test_a_card_that_changed_or_left_under_a_running_agent():
    node = Watched()
    node.gpu()
    changed = node.see(gpus=(GPU, replace(GPU, index=1, uuid="GPU-3")))
    assert (changed.verdict, changed.reason) == (Verdict.SUSPECT, "gpu_changed")
    gone = Watched()
    gone.gpu()
    beat = replace(NODE, ts=2000.0, allocation="1-n0", gpus=(GPU,))
    assert judge(beat, 0, remember(gone.history, beat, 0)).reason == "gpu_missing"
    later = replace(beat, allocation="1-n1", gpus=(GPU, replace(GPU, index=1, uuid="GPU-3")))
    assert judge(later, 2, remember(gone.history, later, 2)).reason == "ok", "a new allocation begins again"


def test_nvlinks_that_were_up():
    node = Watched()
    both = (replace(GPU, nvlinks=18), replace(GPU, index=1, uuid="GPU-2", nvlinks=18))
    node.see(gpus=both)
    assert node.see(gpus=tuple(replace(gpu, nvlinks=17) for gpu in both)).reason == "nvlink_down", "all at once"


def test_infiniband_ports():
    node = Watched()
    up, down = Port(name="mlx5_0/1", active=True, downed=7), Port(name="mlx5_0/1", active=False, downed=8)
    uncabled = Port(name="mlx5_1/1", active=False, downed=0)
    assert node.see(machine=Machine(ports=(up, uncabled))).reason == "ok"
    assert node.see(119, machine=Machine(ports=(down, uncabled))).reason == "ok"
    assert node.see(1, machine=Machine(ports=(down, uncabled))).reason == "port_down"
    assert node.see(1, machine=Machine(ports=(replace(up, downed=9), uncabled))).reason == "ok"
    assert node.see(1, machine=Machine(ports=(replace(up, downed=10), uncabled))).reason == "port_flaps"


def test_a_mount_that_is_gone_or_read_only():
    node = Watched()
    mounts = {"/": True, "/checkpoints": True, "/data": False}
    assert node.see(machine=Machine(mounts=mounts)).reason == "ok"
    assert node.see(9, machine=Machine(mounts=None)).reason == "ok", "the host does not say"
    assert node.see(4, machine=Machine(mounts={"/": True})).reason == "ok"
    lost = node.see(machine=Machine(mounts={"/": True}))
    assert (lost.verdict, lost.reason, lost.evidence["lost"]) == (Verdict.SUSPECT, "mount_lost", ["/checkpoints"])
    assert node.see(machine=Machine(mounts=mounts)).reason == "ok"
    read_only = node.see(5, machine=Machine(mounts={**mounts, "/checkpoints": False}))
    assert (read_only.reason, read_only.evidence["read_only"]) == ("mount_read_only", ["/checkpoints"])


def test_an_ethernet_adapter_that_loses_its_carrier():
    node = Watched()
    assert node.see(machine=Machine(carriers={"eth0": 100, "eth1": 7})).reason == "ok"
    assert node.see(machine=Machine(carriers={"eth0": 104, "eth1": 7})).reason == "ok"
    lost = node.see(machine=Machine(carriers={"eth0": 105, "eth1": 7, "eth2": 9}))
    assert (lost.verdict, lost.reason) == (Verdict.SUSPECT, "carrier_lost")
    assert lost.evidence["lost"] == {"eth0": 5, "eth1": 0, "eth2": 0}
    later = node.see(seconds=90_000.0, machine=Machine(carriers={"eth0": 105, "eth1": 7}))
    assert later.reason == "ok", "a new day begins"


def test_a_clock_that_nothing_keeps_right_is_said_of_a_node_by_itself():
    alone = replace(NODE, machine=Machine(clock_set=False))
    assert (judge(alone, 2).verdict, judge(alone, 2).reason) == (Verdict.HEALTHY, "clock_unset")
    assert judge(replace(alone, machine=Machine(clock_set=None)), 2).reason == "ok"
    held = replace(alone, allocation="1-n0")
    assert judge(held, 2).reason == "ok", "the clocks of nodes that are held are compared with each other"


LINK = "NVRM: Xid (PCI:0000:3b:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 14"


@pytest.mark.parametrize(
    ("registers", "verdict", "verb", "cause"),
    [
        ("0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.ISOLATE, Cause.CONNECTION),
        ("0x200000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.ISOLATE, Cause.SIGNAL),
        ("0x10, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.RESET_GPU, Cause.PARITY),
        ("0x0, 0x0, 0x10000, 0x0, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.RESET_GPU, Cause.UNLISTED),
        ("0x0, 0x0, 0x0, 0x40000, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.RESET_GPU, Cause.FABRIC),
        ("0x0, 0x0, 0x0, 0x0, 0x100000, 0x0, 0x0", Verdict.HEALTHY, Verb.NONE, Cause.THRESHOLD),
        ("0x40800001, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0", Verdict.HEALTHY, Verb.NONE, Cause.HARMLESS),
        (
            "0x40800001, 0xff, 0x0, 0x0, 0x0, 0x0, 0x0",
            Verdict.HEALTHY,
            Verb.NONE,
            Cause.HARMLESS,
        ),  # the second counts not
        ("0x100010, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0", Verdict.SUSPECT, Verb.RESET_GPU, Cause.PARITY),
    ],
)
def test_xid_74_of_a_hopper_goes_by_its_registers(registers: str, verdict: Verdict, verb: Verb, cause: Cause):
    hopper = replace(GPU, name="NVIDIA H100 80GB HBM3", pci="0000:3b:00")
    said = judge(replace(NODE, gpus=(hopper,), xids=(logged(f"{LINK}({registers})"),)), 1)
    assert (said.verdict, said.evidence["verb"]) == (verdict, verb)
    assert (said.evidence["link"], said.evidence["causes"][0], said.evidence["uuid"]) == (14, cause, "GPU-1")


def test_xid_74_of_another_card_or_with_another_error_does_not():
    ampere = replace(GPU, name="NVIDIA A100-SXM4-80GB", pci="0000:3b:00")
    connection = logged(f"{LINK}(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)")
    said = judge(replace(NODE, gpus=(ampere,), xids=(connection,)), 1)
    assert (said.evidence["verb"], "link" in said.evidence) == (Verb.RESET_GPU, False)
    hopper = replace(ampere, name="NVIDIA H200")
    secondary = logged(f"{LINK}(0x2, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)")
    assert judge(replace(NODE, gpus=(hopper,), xids=(secondary,)), 1).verdict is Verdict.SUSPECT, "alone"
    switch = logged("nvidia-nvswitch0: SXid (PCI:0000:06:00.0): 11012, Non-fatal, Link 3")
    assert judge(replace(NODE, gpus=(hopper,), xids=(secondary, switch)), 1).verdict is Verdict.HEALTHY


def test_a_full_disk_is_said_and_nothing_follows():
    judgement = judge(replace(NODE, machine=Machine(disk_free=1, disk_size=100)), 2)
    assert (judgement.verdict, judgement.reason) == (Verdict.HEALTHY, "disk_low")
    assert judge(replace(NODE, machine=Machine(disk_free=3, disk_size=100)), 2).reason == "ok"


def test_equal_readings_leave_the_history_as_it_is():
    node = Watched()
    node.gpu(300, throttle=0x40, remap_pending=True)
    before = node.history
    node.gpu(throttle=0x40, remap_pending=True)
    assert node.history == before, "or every heartbeat would be judged again"


def test_a_node_that_is_not_like_the_others():
    gpu = replace(GPU, name="H200", vbios="96.00", inforom="G1", clock_most=1980)
    beats = [replace(NODE, node=f"n{i}", driver="570.1", gpus=(gpu,)) for i in range(4)]
    assert differing(beats) == {}
    odd = [*beats[:3], replace(beats[3], driver="535.1")]
    (judgement,) = differing(odd).values()
    assert (judgement.verdict, judgement.reason) == (Verdict.HEALTHY, "driver_differs")
    assert (judgement.evidence["value"], judgement.evidence["most"]) == ("535.1", "570.1")
    for change, reason in (
        ({"vbios": "95.00"}, "vbios_differs"),
        ({"inforom": "G0"}, "inforom_differs"),
        ({"clock_most": 1500}, "clock_differs"),
    ):
        found = differing([*beats[:3], replace(beats[3], gpus=(replace(gpu, **change),))])
        assert {node: each.reason for node, each in found.items()} == {"n3": reason}


def test_a_node_whose_burn_in_was_slower_than_the_others():
    def beat(node: str, tflops: float, gbs: float) -> Heartbeat:
        device = DeviceTest(node=node, local=0, device="NVIDIA H200", tflops=tflops)
        test = BurnIn(nodes=(node,), devices=(device,), alone=(GroupMeasurement(nodes=(node,), gbs=gbs),))
        return replace(NODE, node=node, burn_in=test)

    even = [beat("n1", 700.0, 400.0), beat("n2", 690.0, 395.0), beat("n3", 705.0, 402.0)]
    assert differing(even) == {}
    slow = differing([*even, beat("n4", 600.0, 400.0), beat("n5", 700.0, 300.0)])
    assert {node: each.reason for node, each in slow.items()} == {"n4": "burn_in_slow", "n5": "burn_in_all_reduce"}
    assert {each.verdict for each in slow.values()} == {Verdict.SUSPECT}


def test_a_clock_that_is_wrong_by_more_than_a_minute():
    beats = [replace(NODE, node=f"n{i}", ts=1000.0 + i) for i in range(3)]
    assert differing(beats) == {}
    for ts in (900.0, 1100.0):
        found = differing([*beats, replace(NODE, node="n9", ts=ts)])
        assert {node: each.reason for node, each in found.items()} == {"n9": "time_differs"}
    assert differing([replace(NODE, node="n9", ts=0.0), beats[0]]) == {}, "of two, nobody can say"


def test_who_says_nothing_or_has_no_majority_against_it_does_not_differ():
    beats = [replace(NODE, node=f"n{i}", driver=driver) for i, driver in enumerate(("a", "a", "b", "b"))]
    assert differing(beats) == {}, "two against two"
    assert differing([replace(beats[0], driver=None), *beats[1:3]]) == {}
    assert differing(beats[1:3]) == {}, "of two, nobody can say"
    other_card = replace(GPU, name="A100", vbios="92")
    mixed = [replace(NODE, node=f"n{i}", gpus=(replace(GPU, name="H200", vbios="96"),)) for i in range(3)]
    assert differing([*mixed, replace(NODE, node="n9", gpus=(other_card,))]) == {}


def test_what_others_do_on_a_shared_machine_is_not_left_over():
    busy = replace(NODE, gpus=(replace(GPU, processes=1),))
    assert judge(busy, 1).reason == "left_over"
    assert judge(busy, 0).reason == "ok", "the site says that nodes have no GPUs of their own"


def test_standbys_and_evaluations_on_an_idle_node_are_not_left_over():
    busy = replace(NODE, gpus=(replace(GPU, processes=1),))
    assert judge(replace(busy, standby=1), 1).reason == "ok"
    assert judge(replace(busy, evaluation=EvaluationReport(name="12-ev001")), 1).reason == "ok"
    assert judge(replace(busy, evaluation=EvaluationReport(name="12-ev001", code=0)), 1).reason == "left_over"


# ---- across daemon processes


def journaled(*told: tuple[float, Judgement]) -> list[Entry]:
    return [
        Entry(
            seq=seq,
            epoch=1,
            ts=at,
            event=NodeJudged(
                node="n1",
                host="n1",
                verdict=said.verdict,
                reason=said.reason,
                source=said.source,
                at=at,
                evidence=said.evidence,
            ),
        )
        for seq, (at, said) in enumerate(told, 1)
    ]


OK = Judgement(verdict=Verdict.HEALTHY, reason="ok", source="")
SILENT = Judgement(verdict=Verdict.UNKNOWN, reason="silent", source="")


def after_a_restart(node: Watched, *told: tuple[float, Judgement]) -> Watched:
    later = Watched()
    later.history, later.ts = remembered(journaled(*told)).get("n1", History()), node.ts
    return later


def test_what_comes_again_after_a_restart_of_the_daemon_has_come_again():
    node = Watched()
    first = (node.ts + 2.0, node.gpu(ecc_uncorrected=1))
    ended = (node.ts + 2.0, node.gpu(ecc_uncorrected=0))
    later = after_a_restart(node, first, ended)
    assert later.gpu(ecc_uncorrected=1, seconds=86400.0).evidence["verb"] == Verb.ISOLATE
    elsewhere = after_a_restart(node, first, ended).see(gpus=(replace(GPU, uuid="GPU-9", ecc_uncorrected=1),) * 2)
    assert elsewhere.evidence["verb"] == Verb.RESET_GPU, "another card"
    assert after_a_restart(node, (1.0, OK)).gpu(ecc_uncorrected=1).evidence["verb"] == Verb.RESET_GPU


def test_what_lasts_through_a_restart_of_the_daemon_neither_ends_nor_comes_again():
    node = Watched()
    hot = node.gpu(30, throttle=0x40)
    later = after_a_restart(node, (node.ts, hot), (node.ts + 40.0, SILENT))
    assert later.gpu(throttle=0x40).reason == "thermal_slowdown", "at once: it was confirmed before"
    lost = (node.ts, node.gpu(ecc_uncorrected=1))
    assert after_a_restart(node, lost).gpu(ecc_uncorrected=1).evidence["verb"] == Verb.RESET_GPU
    worse = (node.ts + 2.0, judge(replace(NODE, xids=(xid(79),)), 2))
    assert after_a_restart(node, lost, worse, lost).gpu(ecc_uncorrected=1).evidence["verb"] == Verb.RESET_GPU


def test_an_xid_that_comes_again_after_a_restart_of_the_daemon():
    before = judge(replace(NODE, ts=100.0, xids=(replace(xid(119), at=99.0),)), 2)
    history = remembered(journaled((100.0, before)))["n1"]
    same = replace(NODE, ts=200.0, xids=(replace(xid(119), at=99.0),))
    assert judge(same, 2, remember(history, same, 2)).evidence["verb"] == Verb.RESET_GPU, "the agent still tells it"
    again = replace(NODE, ts=4000.0, xids=(replace(xid(119), at=3999.0),))
    assert judge(again, 2, remember(history, again, 2)).evidence["verb"] == Verb.ISOLATE
