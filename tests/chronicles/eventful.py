"""A lineage to which everything happens once: tests tell what is seen, the real `decide` does the rest.

python -m tests.chronicles.eventful FOLDER    # tells it in FOLDER/12 and draws its chronicle, to be looked at
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from chronicles.logbook.render import render
from opt_ops import playbook_loader
from opt_ops.core import events as e
from opt_ops.core.decide.rules import decide
from opt_ops.core.values import (
    AllocationStatus,
    Checkpoint,
    Driver,
    Outcome,
    Severity,
    Shape,
    StackGroup,
    Tier,
    Verdict,
)
from tests.chronicles.told import OPTIMIZER, Told, falling

POLICY = dataclasses.replace(playbook_loader.load(playbook_loader.folder())[0], least_alert=Severity.INFO)

WAITS = ("distributed_c10d.py:all_reduce", "fsdp.py:_reduce_gradients", "loop.py:train_step", "loop.py:train")
READS = ("data.py:__next__", "<script>alert(1)</script>|`x`:read", "loop.py:train_step", "loop.py:train")


class Lived(Told):
    """Told, with a daemon that decides and people who are notified of it."""

    deaf = False  # no alert gets through
    capabilities: tuple[str, ...] = ()  # of the trainer

    def see(self, *events: e.Event, seconds: float = 1.0) -> None:
        super().see(*events, seconds=seconds)
        for _ in range(60):
            event = decide(self.state, self.now, POLICY)
            if event is None:
                return
            super().see(event, seconds=0.0)
            if isinstance(event, e.AlertIntended) and not self.deaf:
                super().see(e.AlertSettled(alert=event.alert, delivered=True, why=""), seconds=0.002)
        raise AssertionError("decide never comes to rest")

    def begins(self) -> None:
        self.see(
            e.DaemonStarted(host="head", pid=1, version="0.1.0", policy="p", blind_seconds=None),
            e.LineageStarted(
                request="r0",
                author="ann",
                lineage=self.lineage,
                recipe="opt-350m",
                settings=("optim.peak_lr=0.001",),
                shape=Shape(nodes=4, spares=1, ranks_per_node=2, min_nodes=3),
            ),
        )

    def granted(self, job: str, *nodes: str, hours: float | None = None) -> None:
        """The newest allocation is submitted, granted, and its nodes report."""
        allocation = self.state.allocation
        assert allocation is not None
        self.see(e.AllocationSubmitted(allocation=allocation.name, job=job, adopted=False))
        ends_at = None if hours is None else self.now + 3600 * hours
        self.see(
            e.AllocationChanged(
                allocation=allocation.name,
                status=AllocationStatus.RUNNING,
                nodes=nodes,
                reason="",
                ends_at=ends_at,
            ),
            seconds=20.0,
        )
        self.see(*(self.judged(node, Verdict.HEALTHY, "ok") for node in nodes), seconds=6.0)

    def gone(self, allocation: str, reason: str) -> None:
        ended = e.AllocationChanged(allocation=allocation, status=AllocationStatus.ENDED, nodes=(), reason=reason)
        self.see(ended)

    def judged(self, node: str, verdict: Verdict, reason: str, **evidence: Any) -> e.NodeJudged:
        source = "NVIDIA Xid catalogue: REBOOT_NODE" if verdict is Verdict.BAD else "NVML"
        return e.NodeJudged(
            node=node, host=node, verdict=verdict, reason=reason, source=source, at=self.now, evidence=evidence
        )

    def runs(self, last: int, **more: Any) -> str:
        """The newest attempt starts, if it has not, and trains to a step."""
        attempt = self.state.attempt
        assert attempt is not None
        assert attempt.live
        if attempt.started_at is None:
            self.see(e.AttemptStarted(attempt=attempt.name, at=self.now + 1), seconds=2.0)
            configured = e.AttemptConfigured(
                attempt=attempt.name,
                steps=self.steps,
                schedule=self.schedule,
                optimizer=OPTIMIZER,
                versions={"python": "3.11.7", "torch": "2.13.0"},
                layout={"world": 8, "dp": 8, "tp": 1},
                capabilities=self.capabilities,
            )
            self.see(configured, seconds=8.0)
        first = (attempt.last_step or (attempt.checkpoint.step if attempt.checkpoint else 0)) + 1
        self.train(attempt.name, first, last, **more)
        return attempt.name

    def saves(self, step: int, healthy: bool = True) -> Checkpoint:
        assert self.state.run is not None
        return self.save(self.state.run.name, step, healthy)

    def signal(
        self, name: str, step: int | None, nodes: tuple[str, ...] = (), onset: int | None = None, **evidence: Any
    ):
        attempt = self.state.attempt
        assert attempt is not None
        raised = e.SignalRaised(
            signal=name,
            tier=Tier.ACT,
            attempt=attempt.name,
            step=step,
            onset_step=onset,
            at=self.now - 1,
            nodes=nodes,
            rule="the detector's rule",
            evidence=evidence,
            generation=attempt.generation,
        )
        self.see(raised)

    def ends(self, outcome: Outcome = Outcome.STOPPED) -> None:
        attempt = self.state.attempt
        assert attempt is not None
        self.end(attempt.name, outcome, attempt.last_step)

    def dies(self, *ranks: int) -> None:
        """Processes of these ranks are killed, some time after the last step."""
        attempt = self.state.attempt
        assert attempt is not None
        nodes = attempt.nodes_of(ranks)[:1]
        self.now += 2
        self.signal("process_death", attempt.last_step, nodes, rank=ranks[0], signal=9, lost_ranks=list(ranks))

    def joins(self, kept: int | None, repeated: int = 0) -> None:
        """All ranks of the newest generation hold the state of the last step."""
        attempt = self.state.attempt
        assert attempt is not None
        assert attempt.last_step is not None
        joined = e.MembersJoined(
            attempt=attempt.name,
            generation=attempt.generation,
            step=attempt.last_step,
            at=self.now + 2.5,
            kept=kept,
            repeated=repeated,
        )
        self.see(joined, seconds=3.0)

    def hangs(self, odd: int, node: str) -> None:
        self.now += 40
        self.signal("hang", None, seconds=41.0, phase="training", patience=30.0)
        attempt, incident = self.state.attempt, list(self.state.incidents.values())[-1]
        assert attempt is not None
        others = tuple(rank for rank in range(2 * len(attempt.nodes)) if rank not in (odd, 7))
        self.see(
            e.StacksTaken(
                attempt=attempt.name,
                incident=incident.name,
                groups=(StackGroup(ranks=others, frames=WAITS), StackGroup(ranks=(odd,), frames=READS)),
                odd=(odd, 7),
                silent=(7,),
                nodes=(node,),
            )
        )
        self.ends()

    def asks(self, event: Any, author: str, reason: str, **more: Any) -> None:
        self.see(event(request=f"r{self.state.seq}", author=author, reason=reason, **more), seconds=5.0)


def eventful(folder: Path) -> Lived:
    """Everything, once, in an order in which it could happen."""
    told = Lived(folder, steps=1000, step_seconds=4.0)
    told.begins()
    told.granted("4101", "n1", "n2", "n3", "n4", "n5")
    _hardware(told)
    _people(told)
    _planned(told)
    _halted(told)
    return told


def _hardware(told: Lived) -> None:
    told.runs(120)
    told.saves(100)
    told.see(e.StrayFound(job="4099", allocation="12-n0"))
    told.see(e.StrayCancelled(job="4099"))
    told.hangs(odd=5, node="n3")
    told.runs(130)
    told.hangs(odd=5, node="n3")  # the same place again: now its node is taken out
    told.see(e.NodeDrained(node="n3", done=True, why=""))
    told.runs(180)
    told.saves(160)
    told.see(told.judged("n2", Verdict.BAD, "xid_79", xid=79, uuid="GPU-2", line="NVRM: Xid (PCI:0000:3b:00): 79"))
    told.see(e.NodeDrained(node="n2", done=False, why="not permitted"))
    told.ends()
    told.see(seconds=130)  # nobody comes: three of four nodes will do
    told.runs(360)
    told.granted("4102", "m1", "m2")
    told.runs(380)
    told.saves(378)
    told.ends()
    told.runs(420)


def _people(told: Lived) -> None:
    told.saves(400)
    told.asks(e.PauseRequested, "bob", "power work in hall 2")
    told.runs(425)
    told.saves(424)
    told.ends()
    for name in list(told.state.allocations):
        told.gone(name, "no agent runs any more")
    told.now += 7200
    told.asks(e.ResumeRequested, "bob", "the power is back")
    told.now += 600
    told.granted("4103", "p1", "p2", "p3", "p4", "p5")
    told.runs(470)
    told.saves(450)
    told.asks(e.ChangeRequested, "ann", "the bend at 440\nlooks wrong", to_step=430, lr_factor=0.75, skip_batches=60)
    told.ends()
    told.runs(480)
    told.saves(470)
    told.asks(e.ChangeRequested, "ann", "clip harder", lr=6e-5, settings=("optim.clip_norm=0.5",))
    told.saves(480)
    told.ends()
    told.runs(520)
    told.see(e.NodeExcluded(node="p5", incident="operator", reason="fan is loud", request="x1", author="cy"))
    told.see(e.NodeDrained(node="p5", done=True, why=""))
    told.see(e.NodeAllowed(request="x2", author="cy", node="p5", reason="fan replaced"))
    told.see(told.judged("p5", Verdict.HEALTHY, "ok"))
    told.asks(e.DriverChanged, "cy", "I want to look at this myself", driver=Driver.OPERATOR)
    told.saves(500)
    told.runs(560)
    told.signal("loss_spike", 560, onset=530, loss=9.1, median=2.6)
    told.runs(562)
    told.see(e.RequestRefused(request="x3", author="cy", verb="pause", why="<b>no</b>"))
    told.asks(e.DriverChanged, "cy", "it healed", driver=Driver.DAEMON)


def _planned(told: Lived) -> None:
    told.saves(550)
    old = next(iter(told.state.held.values()))
    running = AllocationStatus.RUNNING
    told.see(
        e.AllocationChanged(allocation=old.name, status=running, nodes=old.nodes, reason="", ends_at=told.now + 260)
    )
    told.granted("4104", "q1", "q2", "q3", "q4", "q5")  # its successor
    told.runs(565)
    told.saves(564)
    told.ends()
    told.gone(old.name, "TIMEOUT")
    told.runs(600)
    told.see(
        e.SignalRaised(
            signal="save_failed",
            tier=Tier.ALERT,
            attempt=told.state.attempt.name if told.state.attempt else "",
            step=600,
            onset_step=600,
            at=told.now,
            rule="the trainer says that a checkpoint could not be saved",
            evidence={"error": "No space left on device"},
        )
    )


def _halted(told: Lived) -> None:
    told.saves(600)
    told.runs(620)
    for _ in range(2):
        told.signal(
            "out_of_memory", told.state.attempt.last_step if told.state.attempt else 0, ("q2",), rank=3, code=84
        )
        told.deaf = told.state.status == "HALTED"
        if not told.state.ended:
            told.ends()
            told.deaf = True
            told.runs(615)
    page = next(name for name in told.state.alerts if "halted" in name)
    told.see(e.AlertSettled(alert=page, delivered=False, why="HTTP 503 from <the pager>"), seconds=3600)
    told.ends(Outcome.STOPPED)
    told.deaf = False
    told.asks(e.ResumeRequested, "ann", "smaller micro-batch on q2")
    told.granted("4105", "q1", "q2", "q3", "q4", "q5")
    told.runs(1000, loss=falling)
    told.saves(1000)
    told.ends(Outcome.COMPLETED)
    for held in told.state.live_allocations:
        told.gone(held.name, "no agent runs any more")


if __name__ == "__main__":
    target = Path(sys.argv[1]) / "12"
    eventful(target)
    print(*render(target), sep="\n")
