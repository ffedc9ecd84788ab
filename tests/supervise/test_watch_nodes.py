"""The watch over nodes: a verdict from several heartbeats, or from several nodes, becomes an event once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from opt_ops.core.events import AllocationChanged, AllocationSubmitted, AttemptIntended, NodeAllowed, NodeJudged
from opt_ops.core.health import Gpu, Heartbeat
from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest
from opt_ops.core.values import AllocationStatus, Shape, Verdict
from opt_ops.supervise.watch_nodes import NodeWatch
from tests.core.story import Story

GPU = Gpu(index=0, uuid="GPU-1", serial="1", name="H200", throttle=0x1, ecc_uncorrected=0)


class Watched:
    """Nodes n1 to n3 of a lineage that holds them, and a clock."""

    def __init__(self) -> None:
        self.story = Story()
        self.story.begin()
        self.story.hold()
        self.holder = self.story.state.allocation.name
        self.seconds = 1000.0
        self.beats: list[Heartbeat] = []
        clock = SimpleNamespace(monotonic=lambda: self.seconds, now=lambda: self.seconds)
        policy = SimpleNamespace(silent_seconds=30.0, expected_gpus=1)
        training = SimpleNamespace(report_progress=lambda _: ())
        agents = SimpleNamespace(heartbeats=lambda: self.beats)
        self.watch = NodeWatch(policy, SimpleNamespace(unfit={}), training, agents, clock)
        self.see()
        assert {name: [gpu.uuid for gpu in node.gpus] for name, node in self.story.state.nodes.items()} == {
            name: [f"GPU-{name}"] for name in ("n1", "n2", "n3")
        }, "their GPUs are journaled once"

    def see(self, times: int = 1, driver: str = "570.1", **gpu: object) -> list[tuple[str, Verdict, str]]:
        """Send heartbeats of all nodes every two seconds, with other readings of n3's GPU."""
        told: list[NodeJudged] = []
        for _ in range(times):
            self.seconds += 2.0
            same = {"ts": self.seconds, "attempt": None, "nvml": "ok", "allocation": self.holder}
            self.beats = [
                Heartbeat(node=node, host=node, driver="570.1", gpus=(replace(GPU, uuid=f"GPU-{node}"),), **same)
                for node in ("n1", "n2", "n3")
            ]
            self.beats[2] = replace(self.beats[2], driver=driver, gpus=(replace(self.beats[2].gpus[0], **gpu),))
            for event in self.watch.observe(self.story.state):
                told.append(event)
                self.story.see(event)
        return [(event.node, event.verdict, event.reason) for event in told]


def test_a_verdict_that_needs_a_row_of_readings_comes_with_the_last_of_them():
    nodes = Watched()
    assert nodes.see(29, throttle=0x80) == []
    assert nodes.see(throttle=0x80) == [("n3", Verdict.SUSPECT, "power_brake")]
    assert nodes.see(5, throttle=0x80) == [], "once"
    assert nodes.see() == [("n3", Verdict.HEALTHY, "ok")]


def test_what_is_bad_in_one_reading_is_told_at_once():
    assert Watched().see(ecc_uncorrected=1) == [("n3", Verdict.BAD, "ecc_uncorrected")]


def test_a_node_with_another_driver_is_told_and_stays_in_use():
    assert Watched().see(40, driver="535.1") == [("n3", Verdict.HEALTHY, "driver_differs")]


def test_a_gpu_that_was_bad_before_is_bad_wherever_it_turns_up_until_it_is_allowed():
    nodes = Watched()
    assert nodes.see(ecc_uncorrected=1) == [("n3", Verdict.BAD, "ecc_uncorrected")]
    assert nodes.story.state.bad_parts == {"GPU-n3": "n3"}
    moved = Heartbeat(
        node="n2",
        host="n2",
        driver="570.1",
        ts=nodes.seconds + 2.0,
        attempt=None,
        nvml="ok",
        allocation=nodes.holder,
        gpus=(replace(GPU, uuid="GPU-n3"),),
    )
    nodes.beats, nodes.seconds = [moved], nodes.seconds + 2.0
    (event,) = nodes.watch.observe(nodes.story.state)
    assert (event.node, event.verdict, event.reason) == ("n2", Verdict.BAD, "known_bad_gpu")
    assert event.evidence["was_in"] == "n3"
    allowed = NodeAllowed(request="r", author="ann", node="n3", reason="it was exchanged")
    nodes.story.see(allowed)
    assert all(event.reason != "known_bad_gpu" for event in nodes.watch.observe(nodes.story.state))


def test_a_node_that_failed_its_burn_in_is_bad_until_it_is_allowed():
    nodes = Watched()
    failed = BurnIn(nodes=("n3",), devices=(DeviceTest(node="n3", local=0, device="H200", memory_wrong=4),))

    def look() -> list[str]:
        nodes.seconds += 2.0
        nodes.beats = [replace(nodes.beats[-1], ts=nodes.seconds, burn_in=failed, burned_at=1001.0)]
        told = list(nodes.watch.observe(nodes.story.state))
        for event in told:
            nodes.story.see(event)
        return [event.reason for event in told if isinstance(event, NodeJudged)]

    assert look() == ["burn_in_memory"]
    assert nodes.story.state.nodes["n3"].excluded_by
    nodes.story.now = nodes.seconds
    nodes.story.see(NodeAllowed(request="r", author="ann", node="n3", reason="another look"))
    assert look() == ["ok"]


def test_a_node_that_is_being_burnt_in_is_waited_for():
    story = Story(shape=Shape(nodes=3, spares=0, ranks_per_node=1))
    story.begin()
    held = story.state.allocation.name
    story.see(AllocationSubmitted(allocation=held, job="77", adopted=False))
    story.see(AllocationChanged(allocation=held, status=AllocationStatus.RUNNING, nodes=("n1", "n2", "n3"), reason=""))
    for node in ("n1", "n2", "n3"):
        story.judge(node, Verdict.UNKNOWN, "burning_in")
    assert story.see(seconds=60.0) == [], "neither given back nor started on"
    started = [event for node in ("n1", "n2", "n3") for event in story.judge(node, Verdict.HEALTHY, "ok")]
    assert any(isinstance(event, AttemptIntended) for event in started)


def test_a_node_with_fewer_gpus_than_most_is_suspect_although_it_has_a_lesser_finding_of_its_own():
    nodes = Watched()
    nodes.watch._policy.expected_gpus = 0
    two = {
        node: [Gpu(index=i, uuid=f"GPU-{node}{'-1' * i}", persistence=False) for i in (0, 1)]
        for node in ("n1", "n2", "n3")
    }
    two["n3"] = two["n3"][:1]
    told: list[NodeJudged] = []
    for _ in range(30):
        nodes.seconds += 2.0
        said = {"ts": nodes.seconds, "attempt": None, "nvml": "ok", "allocation": nodes.holder, "driver": "570.1"}
        nodes.beats = [Heartbeat(node=node, host=node, gpus=tuple(gpus), **said) for node, gpus in two.items()]
        for event in nodes.watch.observe(nodes.story.state):
            told.append(event)
            nodes.story.see(event)
    state = nodes.story.state.nodes
    assert (state["n3"].verdict, state["n3"].reason) == (Verdict.SUSPECT, "gpu_missing")
    assert (state["n1"].verdict, state["n1"].reason) == (Verdict.HEALTHY, "persistence_off")
    assert [event.reason for event in told if event.node == "n3"][-1] == "gpu_missing"
