"""Readings to verdicts: the worst row that applies wins, and what cannot be read is unknown."""

from dataclasses import replace

import pytest

from opt_ops.core.health import Gpu, Heartbeat, Verb, Xid, judge
from opt_ops.core.health.xids import XID_VERBS
from opt_ops.core.values import Verdict

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
