"""A journal in memory: tests tell what is seen, and the real `decide` answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opt_ops import playbook_loader
from opt_ops.core import events as e
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.rules import decide
from opt_ops.core.schedule import PlannedLr
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.values import (
    AllocationStatus,
    Checkpoint,
    Completion,
    Optimizer,
    Outcome,
    RankExit,
    Readback,
    Schedule,
    Shape,
    Tier,
    Verdict,
)
from opt_ops.runfolder.journal import Journal

POLICY: Policy = playbook_loader.load(playbook_loader.folder())[0]
SCHEDULE = Schedule(peak_lr=1e-3, warmup_steps=10, total_steps=1000, final_fraction=0.1)
OPTIMIZER = Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)


class Story:
    """A lineage of two nodes and one spare, told event by event."""

    def __init__(self, policy: Policy = POLICY, shape: Shape | None = None, schedule: Schedule = SCHEDULE) -> None:
        self.policy = policy
        self.schedule = schedule
        self.base_lr: Callable[[int], float] | None = None
        """What the trainer says that its schedule alone gave for an update; None: it says nothing."""
        self.state = State()
        self.init_from: str | None = None  # the checkpoint with the first weights
        self.capabilities: tuple[str, ...] = ()  # of the trainer
        self.entries: list[e.Entry] = []
        self.now = 1_000.0
        self.epoch = 0
        self.shape = shape or Shape(nodes=2, spares=1, ranks_per_node=1)

    # ---- the mechanism

    def write(self, event: e.Event) -> None:
        entry = e.Entry(seq=len(self.entries) + 1, epoch=self.epoch, ts=self.now, event=event)
        self.state = fold(self.state, entry)
        self.entries.append(entry)

    def save(self, folder: Path) -> None:
        """Write it as the journal of the lineage in `folder`."""
        journal = Journal(folder / "journal")
        for entry in self.entries:
            journal.append(journal.stamp(entry.event, entry.ts))
        journal.close()

    def see(self, *events: e.Event, seconds: float = 1.0) -> list[e.Event]:
        """Some time passes, this is seen, and the decisions follow; returns the decisions."""
        self.now += seconds
        for event in events:
            self.write(event)
        return self.decide()

    def decide(self) -> list[e.Event]:
        decided: list[e.Event] = []
        while (event := decide(self.state, self.now, self.policy)) is not None:
            assert len(decided) < 50, f"decide never comes to rest: {decided[-3:]}"
            self.write(event)
            decided.append(event)
        return decided

    # ---- what is usually seen

    def daemon(self, blind: float | None = None) -> list[e.Event]:
        self.epoch += 1
        return self.see(e.DaemonStarted(host="head", pid=1, version="0", policy="p", blind_seconds=blind))

    def begin(self) -> list[e.Event]:
        self.daemon()
        return self.see(
            e.LineageStarted(
                request="r0",
                author="ann",
                lineage="12",
                recipe="opt-tiny",
                settings=(),
                shape=self.shape,
                init_from=self.init_from,
            )
        )

    def hold(self, *nodes: str) -> list[e.Event]:
        allocation = self.state.allocation
        assert allocation is not None
        self.see(e.AllocationSubmitted(allocation=allocation.name, job="77", adopted=False))
        held = e.AllocationChanged(
            allocation=allocation.name, status=AllocationStatus.RUNNING, nodes=nodes or ("n1", "n2", "n3"), reason=""
        )
        decided = self.see(held)
        return decided + [d for node in held.nodes for d in self.judge(node, Verdict.HEALTHY, "ok")]

    def changed(
        self,
        allocation: str,
        *nodes: str,
        status: AllocationStatus = AllocationStatus.RUNNING,
        ends_at: float | None = None,
    ) -> list[e.Event]:
        """The scheduler says something new about a job."""
        return self.see(
            e.AllocationChanged(allocation=allocation, status=status, nodes=nodes, reason="", ends_at=ends_at)
        )

    def judge(self, node: str, verdict: Verdict, reason: str, drill: str | None = None) -> list[e.Event]:
        return self.see(
            e.NodeJudged(node=node, host=node, verdict=verdict, reason=reason, source="test", at=self.now, drill=drill)
        )

    def train(
        self,
        to_step: int,
        *,
        lr_error: float = 1.0,
        betas: tuple[float, ...] = OPTIMIZER.betas,
        readbacks: int = 5,
        unseen: int = 0,
    ) -> list[e.Event]:
        """The newest attempt starts if it has not, and trains to a step. Telemetry lacks its first `unseen` steps."""
        attempt = self.state.attempt
        assert attempt is not None
        first = (attempt.checkpoint.step if attempt.checkpoint else 0) + 1 + unseen
        decided: list[e.Event] = []
        if attempt.started_at is None:
            decided += self.see(e.AttemptStarted(attempt=attempt.name, at=self.now))
            configured = e.AttemptConfigured(
                attempt=attempt.name,
                steps=1000,
                schedule=self.schedule,
                optimizer=OPTIMIZER,
                versions={},
                layout={},
                capabilities=self.capabilities,
            )
            decided += self.see(configured)
        planned = PlannedLr(schedule=self.schedule, factors=self.state.runs[attempt.run].lr_factors)

        def read(first: int) -> tuple[Readback, ...]:
            base = {step: self.base_lr(step) if self.base_lr else None for step in range(first, first + readbacks)}
            return tuple(
                Readback(
                    step=step,
                    lr=5e-4 if (lr := planned.due(step, base[step])) is None else lr * lr_error,
                    betas=betas,
                    weight_decay=OPTIMIZER.weight_decay,
                    clip_norm=OPTIMIZER.clip_norm,
                    loss=3.0,
                    base_lr=base[step],
                )
                for step in range(first, min(first + readbacks, to_step + 1))
            )

        at = self.now + 1.0
        joined = [m for m in attempt.members if m.step is not None and m.first_step is None]
        again = joined[-1].step + 1 if joined and joined[-1].step is not None else None
        progressed = e.AttemptProgressed(
            attempt=attempt.name,
            first_step=first if attempt.first_step is None else attempt.first_step,
            first_step_at=at if attempt.first_step_at is None else attempt.first_step_at,
            step=to_step,
            at=at,
            readbacks=read(first) if again is None else (),
            generation=joined[-1].generation if joined else 1,
            generation_first_step=again,
            generation_first_at=None if again is None else at,
            generation_readbacks=() if again is None else read(again),
        )
        return decided + self.see(progressed)

    def standbys(self, **ready: int) -> list[e.Event]:
        """So many warm ranks wait on these nodes."""
        return self.see(*(e.StandbySeen(node=node, ready=count) for node, count in ready.items()))

    def joins(self, step: int, kept: int | None = None, repeated: int = 0) -> list[e.Event]:
        """All ranks of the newest generation hold the state of a step."""
        attempt = self.state.attempt
        assert attempt is not None
        return self.see(
            e.MembersJoined(
                attempt=attempt.name,
                generation=attempt.generation,
                step=step,
                at=self.now + 1.0,
                kept=kept,
                repeated=repeated,
            )
        )

    def checkpoint(
        self, step: int, *, healthy: bool = True, verify: bool = True, nodes: tuple[tuple[str, ...], ...] = ()
    ) -> list[e.Event]:
        assert self.state.run is not None
        run = self.state.run.name
        tier = "snapshot" if nodes else "step"
        checkpoint = Checkpoint(run=run, step=step, path=f"/runs/12/{run}/checkpoints/{tier}-{step:08d}", nodes=nodes)
        decided = self.see(e.CheckpointSeen(checkpoint=checkpoint))
        if verify:
            decided += self.see(
                e.CheckpointVerified(checkpoint=checkpoint, healthy=healthy, why="" if healthy else "x")
            )
        return decided

    def signal(
        self,
        name: str,
        step: int | None,
        onset: int | None = None,
        nodes: tuple[str, ...] = (),
        digest: Mapping[str, Any] | None = None,
        margin: int = 0,
        **evidence: object,
    ) -> list[e.Event]:
        """A finding that is acted on. `digest`: what telemetry shows around the onset; `margin`: steps before it."""
        assert self.state.attempt is not None
        return self.see(
            e.SignalRaised(
                generation=self.state.attempt.generation,
                signal=name,
                tier=Tier.ACT,
                attempt=self.state.attempt.name,
                step=step,
                onset_step=onset,
                at=self.now,
                nodes=nodes,
                rule="test",
                evidence=evidence,
                onset=digest or {},
                margin_steps=margin,
            )
        )

    def spike(self, step: int, onset: int) -> list[e.Event]:
        return self.signal("loss_spike", step, onset, loss=9.0, median=3.0)

    def rank_dies(self, step: int, rank: int = 1, node: str = "n2", code: int | None = None) -> list[e.Event]:
        number = None if code else 9
        kind = {78: "user_error", 65: "checkpoint_refused"}.get(code or 0, "process_death")
        return self.signal(kind, step, None, (node,), rank=rank, code=code, signal=number)

    def ends(self, outcome: Outcome = Outcome.STOPPED, last_step: int | None = None) -> list[e.Event]:
        attempt = self.state.attempt
        assert attempt is not None
        ranks = enumerate(attempt.nodes)
        code = 0 if outcome is Outcome.COMPLETED else None
        exits = tuple(
            RankExit(rank=i, node=node, code=code, signal=None if code == 0 else 15, at=self.now) for i, node in ranks
        )
        return self.see(
            e.AttemptEnded(
                attempt=attempt.name,
                outcome=outcome,
                last_step=last_step or attempt.last_step,
                last_step_at=self.now if last_step or attempt.last_step else None,
                exits=exits,
            )
        )

    def evaluated(self, step: int, **more: Any) -> list[e.Event]:
        """A score of a checkpoint of the newest run."""
        assert self.state.run is not None
        return self.see(evaluated(more.pop("run", self.state.run.name), step, **more))

    def training(self, step: int = 450, checkpoints: tuple[int, ...] = (100, 200, 300, 400)) -> Story:
        """Told up to an attempt that trains at `step` with good checkpoints behind it."""
        self.begin()
        self.hold()
        self.train(step)
        for each in checkpoints:
            self.checkpoint(each)
        return self


def evaluated(run: str, step: int, **more: Any) -> e.CheckpointEvaluated:
    """A score: of each checkpoint another request and digest, unless they are given."""
    fields: dict[str, Any] = {
        "task": "hellaswag",
        "metric": "acc_norm",
        "value": 0.5,
        "stderr": 0.01,
        "n": 10_042,
        "shots": 0,
        "harness": "lm-eval 0.4.13",
        "task_version": "1.0",
        "digest": hashlib.sha256(f"{run} {step}".encode()).hexdigest(),
        "file": f"evaluations/step-{step:08d}/results.json",
        "sha256": "0" * 64,
        "author": "ann",
        **more,
    }
    named = "-".join(str(fields[each]) for each in ("task", "metric", "shots", "harness", "task_version", "digest"))
    return e.CheckpointEvaluated(request=f"evaluated-{named}", run=run, step=step, **fields)


def sampled(run: str, step: int, *completions: Completion, **more: Any) -> e.CheckpointSampled:
    """The fixed prompts, as a checkpoint completes them."""
    fields: dict[str, Any] = {
        "digest": hashlib.sha256(f"{run} {step}".encode()).hexdigest(),
        "tokens": 60,
        "seed": 1,
        "file": f"evaluations/step-{step:08d}/samples.json",
        "sha256": "0" * 64,
        "author": "ann",
        **more,
    }
    request = f"sampled-{fields['digest']}"
    return e.CheckpointSampled(request=request, run=run, step=step, completions=completions, **fields)


def kinds(events: list[e.Event]) -> list[str]:
    return [e.kind_of(event) for event in events]


def only(events: list[e.Event], kind: type) -> e.Event:
    (found,) = [event for event in events if isinstance(event, kind)]
    return found
