"""Anything may happen in any order: Hypothesis injects faults, crashes, second daemons and requests. It looks for a
lineage that contradicts itself, does something twice, or gets stuck.

The 60 default histories are always the same.
`MACHINE_EXAMPLES=2000 pytest tests/laboratory/test_machine.py` runs other
histories each time, and shrinks what it finds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from opt_ops.core import events as e
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned, SimulatedFault
from opt_ops.runfolder.journal import Fenced
from tests.laboratory.simulated_lineage import SimulatedLineage, answers, physics, start, without_sync

EXAMPLES = os.environ.get("MACHINE_EXAMPLES")

NODES, SPARES, STEPS = 2, 1, 200
HANDOVER = 60.0  # seconds in which ranks of the previous attempt may still be ending
ORPHAN = 120.0  # seconds in which a second job of one name may stay unnoticed
TIMEOUT = 86400.0  # seconds in which a lineage must end once nothing goes wrong any more

TRAINING = (faults.KillRank(), faults.KillRank(code=1), faults.Hang(), faults.Damage())
HARDWARE = (
    faults.BadGpu(),
    faults.BadGpu(xid=None, kills=True),
    faults.BadGpu(node="n003"),
    faults.NodeDown(seconds=1200.0),
    faults.NodeDown(seconds=None),
    faults.NodeDown(seconds=900.0, relapse=True),
    faults.NodeCutOff(seconds=20.0),
    faults.NodeCutOff(seconds=400.0),
    faults.SlowDown(factor=2.0, seconds=900.0),
)
SITE = (
    faults.EndJob(),
    faults.EndJob(reason="PREEMPTED", notice=60.0),
    faults.SchedulerAway(seconds=200.0),
    faults.NoNodes(seconds=900.0),
    faults.LostAnswer(accepted=True),
    faults.LostAnswer(accepted=False),
    faults.ClockJump(seconds=3600.0),
    faults.ClockJump(seconds=-3600.0),
    faults.ClockJump(seconds=-5.0),
)
AND_THEN = st.sampled_from((0.0, 5.0, 40.0, 300.0, 900.0))  # seconds that pass

REQUESTS = (
    ("note", {"target": "1", "text": "hm"}),
    ("drill", {"fault": "kill-rank", "rank": 1}),
    ("drill", {"fault": "xid", "node": "n002", "xid": 79}),
    ("drill", {"fault": "lr", "factor": 40.0, "updates": 5, "from_step": None}),
    ("drill", {"fault": "hang", "rank": 0}),
    ("pause", {"reason": "storage is moved"}),
    ("pause", {"reason": "a demonstration", "keep_nodes": True}),
    ("resume", {"reason": "done"}),
    ("change", {"reason": "it is noisy", "lr_factor": 0.5}),
    ("change", {"reason": "back", "to_step": 20, "skip_batches": 5}),
    ("change", {"reason": "clip", "settings": ["optim.clip_norm=0.5"]}),
    ("drive", {"driver": "person", "reason": "let me"}),
    ("drive", {"driver": "daemon", "reason": "your turn"}),
    ("stop", {"reason": "enough"}),
    ("start", start().arguments),
    ("dance", {}),
    ("drill", {}),
    ("change", {"reason": "?", "lr_factor": -1}),
)


class Machine(RuleBasedStateMachine):
    """One lineage on eight nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.patch = pytest.MonkeyPatch()
        without_sync(self.patch)
        self.asked: list[str] = []
        self.two_attempts_since: float | None = None
        self.two_jobs_since: float | None = None

    @initialize(divergence=st.sampled_from((None, 120, 160)), cured=st.booleans(), least=st.sampled_from((0, 1)))
    def begin(self, divergence: int | None, cured: bool, least: int) -> None:
        plan = [Planned(fault=start(nodes=NODES, spares=SPARES, min_nodes=least), at=0.0)]
        if divergence is not None:
            ill = Divergence(step=divergence, cured_below=0.8 if cured else 0.4)
            plan.append(Planned(fault=faults.Diverge(divergence=ill), at=0.0))
        self.lineage = SimulatedLineage(
            self.folder, plan, physics(STEPS, save_every=10, time_limit=72 * 3600.0 if divergence else 5000.0)
        )
        self.time_passes(700.0)  # most faults happen during training

    # ---- what happens

    @rule(seconds=st.sampled_from((10.0, 120.0, 2400.0)))
    def time_passes(self, seconds: float) -> None:
        until = self.lineage.world.now + seconds
        while self.lineage.world.now < until and not self.settled():
            self.lineage.drive(min(until, self.lineage.world.now + 60.0))
            self.watch_the_world()

    @rule(fault=st.sampled_from(TRAINING), then=AND_THEN)
    def training_fails(self, fault: SimulatedFault, then: float) -> None:
        self.lineage.world.strike(fault)
        self.time_passes(then)

    @rule(fault=st.sampled_from(HARDWARE), then=AND_THEN)
    def hardware_fails(self, fault: SimulatedFault, then: float) -> None:
        self.lineage.world.strike(fault)
        self.time_passes(then)

    @rule(fault=st.sampled_from(SITE), then=AND_THEN)
    def the_site_fails(self, fault: SimulatedFault, then: float) -> None:
        self.lineage.world.strike(fault)
        self.time_passes(then)

    @rule(ahead=st.integers(0, 60))
    def the_daemon_dies_soon(self, ahead: int) -> None:
        self.lineage.boundaries.fatal = len(self.lineage.boundaries.passed) + ahead

    @rule(unwatched=st.sampled_from((0.0, 3.0, 45.0, 900.0)))
    def the_daemon_dies(self, unwatched: float) -> None:
        self.lineage.end()
        self.lineage.world.advance(self.lineage.world.now + unwatched)

    @rule()
    def a_second_daemon_starts(self) -> None:
        first, self.lineage.supervisor = self.lineage.supervisor, None
        if first is None:
            return
        self.lineage.boundaries.fatal = None
        journals, self.lineage.open_journals[:] = list(self.lineage.open_journals), []
        self.lineage.begin()
        before = Counter(self.lineage.boundaries.effects)
        with pytest.raises(Fenced):
            first.tick()
        touched = self.lineage.boundaries.effects - before
        assert touched.keys() <= {"done"}, f"a fenced daemon did more than clear the inbox: {touched}"
        for journal in journals:
            journal.close()

    @rule(request=st.sampled_from(REQUESTS), then=AND_THEN)
    def somebody_asks(self, request: tuple[str, dict[str, object]], then: float) -> None:
        name = f"r-{len(self.asked)}"
        self.asked.append(name)
        self.lineage.world.strike(faults.Ask(request=name, verb=request[0], arguments=request[1]))
        self.time_passes(then)

    @rule(node=st.sampled_from(("n001", "n002", "n003")), allowed=st.booleans(), then=AND_THEN)
    def somebody_thinks_of_a_node(self, node: str, allowed: bool, then: float) -> None:
        self.somebody_asks(("allow" if allowed else "exclude", {"node": node, "reason": "it hums"}), then)

    @rule(which=st.integers(0, 5))
    def somebody_asks_twice(self, which: int) -> None:
        name = self.asked[which] if which < len(self.asked) else "r-start"
        self.lineage.world.strike(faults.Ask(request=name, verb="note", arguments={"target": "1", "text": "again"}))

    # ---- what must hold

    def settled(self) -> bool:
        return self.lineage.supervisor is not None and self.lineage.state.finished

    @invariant()
    def the_journal_is_the_truth(self) -> None:
        if self.lineage.supervisor is not None:
            assert self.lineage.state == self.lineage.replayed()

    @invariant()
    def watch_the_world(self) -> None:
        world = self.lineage.world
        heard = {
            attempt
            for attempt, nodes in world.alive().items()
            if any(world.cluster.nodes[node].reachable for node in nodes)
        }
        if len(heard) < 2:
            self.two_attempts_since = None
        elif self.two_attempts_since is None:
            self.two_attempts_since = world.now
        elif self.lineage.supervisor is not None:
            assert world.now - self.two_attempts_since <= HANDOVER, f"ranks of {heard} are alive"
        assert set(world.agents.starts.values()) <= {1}, "ranks were started twice"

    def check_history(self) -> State:
        """Check every decision of the journal against the state on which it was made."""
        state = State()
        for entry in self.lineage.entries():
            if isinstance(entry.event, e.AttemptIntended):
                excluded = {name for name, node in state.nodes.items() if node.excluded_by is not None}
                assert excluded.isdisjoint(entry.event.nodes), f"{entry.event.attempt} starts on an excluded node"
                chosen = entry.event.checkpoint
                assert chosen is None or state.checkpoints[chosen.path].good, f"{chosen} is not known to be good"
                assert chosen is None or not self.lineage.world.checkpoints[chosen.path].damage
            if isinstance(entry.event, e.AllocationIntended):
                pending = sum(each.wanted for each in state.allocations.values() if each.pending)
                assert pending + entry.event.nodes <= NODES + SPARES, f"{pending} are asked for already"
            state = fold(state, entry)
        return state

    def teardown(self) -> None:
        try:
            if hasattr(self, "lineage"):
                self.let_it_end()
        finally:
            self.lineage.end()
            self.patch.undo()
            shutil.rmtree(self.folder)

    def let_it_end(self) -> None:
        world = self.lineage.world
        world.cluster.conditions.lost_answers.clear()
        self.lineage.boundaries.fatal = None
        self.lineage.drive(world.now + 2 * 3600.0, tick=20.0)
        for name in world.cluster.nodes:  # operators repair everything, and allow it
            world.cluster.come_back(name)
            world.strike(faults.Ask(request=f"r-allow-{name}", verb="allow", arguments={"node": name, "reason": ""}))
        world.strike(faults.Ask(request="r-hands-off", verb="drive", arguments={"driver": "daemon"}))
        world.strike(faults.Ask(request="r-go-on", verb="resume"))
        self.lineage.drive(world.now + TIMEOUT, tick=20.0)
        state = self.check_history()
        event(f"ended {state.status}")
        for incident in state.incidents.values():
            event(f"incident {incident.kind}")
        assert state.finished, f"stuck: {state.status} since {state.since}"
        assert not world.cluster.live, "jobs outlive the lineage"
        assert not world.alive(), "ranks outlive the lineage"
        submitted = Counter(job.allocation for job in world.cluster.jobs.values())
        assert all(number == 1 for number in submitted.values()), submitted
        if state.status is Status.COMPLETED:
            unproven = [each.name for each in state.incidents.values() if each.closed_at is None]
            assert not unproven, unproven
        answered = answers(self.lineage.entries())
        wrong = [
            name for name in self.asked if answered[name] != 1 and not (answered[name] == 0 and name in world.inbox)
        ]
        assert not wrong, {name: answered[name] for name in wrong}


Machine.TestCase.settings = settings(
    max_examples=int(EXAMPLES or 30),
    stateful_step_count=12,
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=list(HealthCheck),
    # A history is short anyway; shrinking it takes minutes.
    phases=(Phase.generate,) if EXAMPLES is None else tuple(Phase),
)
TestMachine = Machine.TestCase
