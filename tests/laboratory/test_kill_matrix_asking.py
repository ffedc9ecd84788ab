"""The daemon is killed between a proposal, its answer and what follows: one action or none, never two.

The world is simulated. A person answers a while after a proposal was journaled, or nobody does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import held_back, open_proposals
from opt_ops.core.state.status import Status
from opt_ops.core.values import ProposalStatus
from opt_ops.laboratory.simulated import Costs, faults
from opt_ops.laboratory.simulated.training import Divergence
from opt_ops.laboratory.simulated.world import Planned
from tests.laboratory.simulated_lineage import Boundaries, SimulatedLineage, answers, physics, start, without_sync

COSTS = Costs(queue=10.0, startup=10.0, load=5.0)


def asked_start() -> faults.Ask:
    """The request that starts a lineage which asks."""
    request = start()
    return faults.Ask(request=request.request, verb=request.verb, arguments={**request.arguments, "driver": "ask"})


@dataclass(frozen=True)
class Case:
    """What fails, what a person says about it, and what becomes of it."""

    fault: Planned
    verb: str | None  # None: nobody answers
    status: ProposalStatus
    acts: bool
    attempts: int
    steps: int = 80
    step_seconds: float = 6.0
    kind: str = "process_death"
    resumes: bool = False  # whether the person resumes the lineage once the answer was taken


DEATH = Planned(fault=faults.KillRank(rank=1), step=40)
SPIKE = Planned(fault=faults.Diverge(divergence=Divergence(step=180)), at=0.0)
CASES = {
    "approved": Case(DEATH, "approve", ProposalStatus.APPROVED, acts=True, attempts=2),
    "declined": Case(DEATH, "decline", ProposalStatus.DECLINED, acts=False, attempts=2, resumes=True),
    "expired": Case(DEATH, None, ProposalStatus.EXPIRED, acts=True, attempts=2),
    "a rollback approved": Case(
        SPIKE, "approve", ProposalStatus.APPROVED, acts=True, attempts=2, steps=300, kind="loss_spike"
    ),
    "a rollback that nobody answers": Case(
        SPIKE, None, ProposalStatus.EXPIRED, acts=False, attempts=1, steps=340, step_seconds=30.0, kind="loss_spike"
    ),
}


class AskedLineage(SimulatedLineage):
    """A lineage with a person who reads the journal and answers."""

    def __init__(self, case: Case, folder: Path, boundaries: Boundaries) -> None:
        plan = (Planned(fault=asked_start(), at=0.0), case.fault)
        settings = physics(case.steps, save_every=30, step_seconds=case.step_seconds)
        super().__init__(folder, plan, settings, COSTS, boundaries)
        self.case = case
        self.window: tuple[int, int] | None = None
        """The boundaries between the proposal and the tick after which nothing waits any more."""
        self.waited = False

    def tick(self) -> bool:
        before = len(self.boundaries.passed)
        self._person(self.state)
        try:
            return super().tick()
        finally:
            state = self.state
            if open_proposals(state) or self.waited:
                first = self.window[0] if self.window else before
                self.window = (first, len(self.boundaries.passed))
            self.waited = bool(open_proposals(state)) or held_back(state) is not None

    def _person(self, state: State) -> None:
        if self.case.verb is None:
            return
        for proposal in open_proposals(state):
            request = f"r-{proposal.name}"
            if request not in self.world.asked and self.world.wall() - proposal.at > 20.0:
                named = {"proposal": proposal.name, "reason": "seen"}
                self.world.ask(faults.Ask(request=request, verb=self.case.verb, arguments=named).as_request())
        if held_back(state) is not None and self.case.resumes and "r-after" not in self.world.asked:
            self.world.ask(faults.Ask(request="r-after", verb="resume", arguments={"reason": "mended"}).as_request())


def tell(case: Case, folder: Path, boundaries: Boundaries) -> AskedLineage:
    lineage = AskedLineage(case, folder, boundaries)
    lineage.drive(until=20_000.0, tick=10.0, settle=60.0)
    lineage.end()
    return lineage


def check(case: Case, lineage: AskedLineage) -> None:
    state, entries, world = lineage.replayed(), lineage.entries(), lineage.world
    assert state.status is Status.COMPLETED, f"{state.status} {state.why}"
    assert len(state.attempts) == case.attempts
    assert set(world.agents.starts.values()) == {1}, "ranks were started twice"
    assert not world.alive(), "ranks left behind"
    told = [entry.event for entry in entries]
    incident = next(each for each in state.incidents.values() if each.kind == case.kind)
    decided = [each for each in told if isinstance(each, e.RecoveryDecided) and each.incident == incident.name]
    assert [not each.advice for each in decided] == [case.acts]
    ended = [each for each in told if isinstance(each, e.ProposalAnswered) and each.incident == incident.name]
    assert [each.status for each in ended] == [case.status]
    assert [each.status for each in incident.proposals] == [case.status]
    assert max(Counter(each.attempt for each in told if isinstance(each, e.StopIntended)).values(), default=1) == 1
    assert answers(entries) == Counter(world.asked)
    assert not world.inbox
    if case.resumes:
        (resumed,) = (entry.seq for entry in entries if isinstance(entry.event, e.ResumeRequested))
        assert [entry.seq > resumed for entry in entries if isinstance(entry.event, e.AttemptIntended)] == [False, True]
    asked = [alert.id for _, alert in world.alerts if alert.id.endswith("/asked")]
    assert set(asked) == {f"{incident.proposals[0].name}/asked"}


def chosen(first: int, last: int) -> list[int]:
    """Every third boundary, at most four of a long wait, and those at its two ends."""
    ends = (*range(first, first + 4), *range(last - 7, last))
    return sorted({*ends, *range(first, last, max(3, (last - first) // 4))} & set(range(first, last)))


@pytest.mark.parametrize("name", CASES)
def test_one_action_or_none_where_the_daemon_dies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    kill_within(CASES[name], tmp_path, every=False)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_one_action_or_none_wherever_the_daemon_dies(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_sync(monkeypatch)
    kill_within(CASES[name], tmp_path, every=True)


def kill_within(case: Case, tmp_path: Path, every: bool) -> None:
    counting = Boundaries()
    whole = tell(case, tmp_path / "counted", counting)
    check(case, whole)
    assert whole.window is not None
    first, last = whole.window
    assert last - first >= 6
    wrong: list[str] = []
    for number in range(first, last) if every else chosen(first, last):
        try:
            check(case, tell(case, tmp_path / str(number), Boundaries(number)))
        except (AssertionError, ValueError) as error:
            wrong.append(f"killed at boundary {number}, {counting.passed[number]}: {error!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seconds", [-50.0, -3600.0])
def test_a_clock_that_is_set_back_brings_the_deadline_earlier_never_later(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_sync(monkeypatch)
    case = CASES["expired"]
    lineage = AskedLineage(case, tmp_path, Boundaries())
    made_at = over_at = None
    lineage.begin()
    while over_at is None:
        lineage.tick()
        proposals = [each for incident in lineage.state.incidents.values() for each in incident.proposals]
        if proposals and made_at is None:
            made_at = lineage.world.now
        if made_at is not None and lineage.world.skew == 0.0 and lineage.world.now > made_at + 60:
            lineage.world.skew = seconds
        if proposals and proposals[0].answer is not None:
            over_at = lineage.world.now
        lineage.world.advance(lineage.world.now + 5.0)
    assert made_at is not None
    assert 60.0 < over_at - made_at <= 125.0
    lineage.end()
