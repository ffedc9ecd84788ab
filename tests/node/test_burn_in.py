"""Real ranks over gloo: the node that computes wrong, forgets, is slow or hangs is the node that is named."""

import pytest

from opt_ops.core.health.burn_in_findings import FLOORS, BurnIn, DeviceTest, burned
from opt_ops.core.health.burn_in_plan import GroupMeasurement
from opt_ops.core.values import Verdict
from opt_ops.node.burn_in import burn_in, on_this_machine


def found(fault: str, nodes: tuple[str, ...], at: str, ranks: int = 1) -> dict[str, set[tuple[Verdict, str]]]:
    commands = on_this_machine(nodes, ranks, "--seconds", "0.1", "--memory-mib", "1")
    commands = [[*command, "--drill", fault] if at in command else command for command in commands]
    said: dict[str, set[tuple[Verdict, str]]] = {}
    for node, judgement in burned(burn_in(commands, nodes, ranks, 60.0)):
        said.setdefault(node, set()).add((judgement.verdict, judgement.reason))
    return said


def test_a_slow_node_is_named_by_regrouping():
    assert found("slow-link", ("n1", "n2", "n3", "n4"), "n3") == {"n3": {(Verdict.SUSPECT, "burn_in_all_reduce")}}


def test_a_node_that_hangs_is_named_and_the_others_go_on():
    assert found("hang", ("n1", "n2", "n3"), "n2") == {"n2": {(Verdict.SUSPECT, "burn_in_silent")}}


@pytest.mark.parametrize(("fault", "reason"), [("wrong-gemm", "burn_in_wrong"), ("bad-memory", "burn_in_memory")])
def test_a_device_that_computes_or_remembers_wrongly_is_bad(fault: str, reason: str):
    assert found(fault, ("n1",), "n1", ranks=2) == {"n1": {(Verdict.BAD, reason)}}


def test_ranks_that_cannot_start_are_silent():
    gone = burn_in([["/bin/false"]], ("n1",), 1, 5.0)
    assert [(node, said.reason) for node, said in burned(gone)] == [("n1", "burn_in_silent")]


# ---- findings from given measurements


def gpu(node: str, local: int = 0, **figures: object) -> DeviceTest:
    usual = {"gemm_wrong": 0, "memory_wrong": 0, "link_wrong": 0, "tflops": 600.0, "to_gbs": 55.0, "from_gbs": 55.0}
    return DeviceTest(
        node=node, local=local, device="NVIDIA H100 80GB HBM3", uuid=f"GPU-{node}{local}", **usual | figures
    )


def reasons(*devices: DeviceTest, **other: object) -> list[tuple[str, str]]:
    return [(node, said.reason) for node, said in burned(BurnIn(nodes=("n1", "n2", "n3"), devices=devices, **other))]


def test_figures_are_compared_with_the_median_of_cards_of_the_same_name():
    assert reasons(gpu("n1"), gpu("n2"), gpu("n3")) == []
    assert reasons(gpu("n1"), gpu("n2", tflops=500.0), gpu("n3")) == [("n2", "burn_in_slow")]
    assert reasons(gpu("n1"), gpu("n2"), gpu("n3", from_gbs=49.0)) == [("n3", "burn_in_link")]
    assert reasons(gpu("n1"), gpu("n2", tflops=500.0)) == [], "of two, nobody can say"


def test_a_card_has_a_floor_by_itself():
    (said,) = [said for _, said in burned(BurnIn(nodes=("n1",), devices=(gpu("n1", to_gbs=21.0),)))]
    assert (said.reason, said.evidence["floor"], said.evidence["uuid"]) == ("burn_in_link", FLOORS["H100"], "GPU-n10")


def test_a_device_that_fails_and_a_node_within_which_nothing_works():
    assert reasons(gpu("n1", error="OutOfMemoryError: …")) == [("n1", "burn_in_failed")]
    alone = tuple(
        GroupMeasurement(nodes=(node,), gbs=gbs) for node, gbs in (("n1", 400.0), ("n2", None), ("n3", 401.0))
    )
    assert reasons(alone=alone) == [("n2", "burn_in_all_reduce")]


def test_what_was_not_measured_or_nowhere_worked_is_unknown():
    broken = (GroupMeasurement(nodes=("n1", "n2"), gbs=None),)
    assert {reason for _, reason in reasons(rounds=(broken,))} == {"burn_in_network"}
    said = list(burned(BurnIn(nodes=("n1", "n2"), finished=False)))
    assert {(each.verdict, each.reason) for _, each in said} == {(Verdict.UNKNOWN, "burn_in_unfinished")}
