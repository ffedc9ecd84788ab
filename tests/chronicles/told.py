"""Lineages made by hand: a journal written by the real `Journal`, folded as it is written, and telemetry beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opt_ops.core import events as e
from opt_ops.core.decide.proof import with_settings
from opt_ops.core.names import attempt_folder
from opt_ops.core.schedule import expected_lr
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.values import (
    Action,
    AllocationStatus,
    Checkpoint,
    Completion,
    LrFactor,
    Optimizer,
    Outcome,
    Parent,
    Readback,
    Schedule,
    Shape,
)
from opt_ops.runfolder.journal import Journal
from tests.core.story import evaluated, sampled

OPTIMIZER = Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
START = 1_795_000_000.0


def falling(step: int) -> float:
    """A loss that falls as losses do, with a deterministic rustle."""
    return 2.0 + 5.0 * math.exp(-step / 80) + 0.05 * math.sin(step * 12.9898)


class Told:
    """A lineage of two nodes and one spare, told event by event."""

    def __init__(self, folder: Path, steps: int = 400, step_seconds: float = 1.0) -> None:
        folder.mkdir(parents=True)
        self.folder, self.steps, self.step_seconds = folder, steps, step_seconds
        self.schedule = Schedule(peak_lr=1e-3, warmup_steps=20, total_steps=steps, final_fraction=0.1)
        self.journal = Journal(folder / "journal")
        self.state = State()
        self.now = START
        self.tokens: Callable[[int], int] = lambda step: step * 1024
        """How many tokens were seen after a step."""

    @property
    def lineage(self) -> str:
        return self.folder.name

    def see(self, *events: e.Event, seconds: float = 1.0) -> None:
        self.now += seconds
        for event in events:
            entry = self.journal.stamp(event, self.now)
            self.state = fold(self.state, entry)
            self.journal.append(entry)

    def restart_daemon(self, blind: float) -> None:
        self.journal.close()
        self.journal = Journal(self.folder / "journal")
        self.see(e.DaemonStarted(host="head", pid=2, version="0.1.0", policy="p", blind_seconds=blind), seconds=blind)

    def begin(self, author: str = "ann", settings: tuple[str, ...] = (), parent: Parent | None = None) -> Told:
        self.see(
            e.DaemonStarted(host="head", pid=1, version="0.1.0", policy="p", blind_seconds=None),
            e.LineageStarted(
                request=f"request-{self.lineage}-{author}",
                author=author,
                lineage=self.lineage,
                recipe="opt-tiny",
                settings=settings,
                shape=Shape(nodes=2, spares=1, ranks_per_node=1),
                parent=parent,
            ),
        )
        return self

    def plan(
        self,
        run: str,
        parent: str | None = None,
        checkpoint: Checkpoint | None = None,
        factors: Iterable[tuple[int, float]] = (),
        incident: str | None = None,
        cause: str = "start",
    ) -> Told:
        lr_factors = tuple(LrFactor(step=step, factor=factor) for step, factor in factors)
        self.see(
            e.RunPlanned(
                run=run, parent=parent, cause=cause, incident=incident, checkpoint=checkpoint, lr_factors=lr_factors
            )
        )
        return self

    def hold(self, *nodes: str, seconds: float = 5.0) -> Told:
        name = f"{self.lineage}-n{len(self.state.allocations)}"
        held = nodes or ("n1", "n2", "n3")
        self.see(e.AllocationIntended(allocation=name, nodes=len(held), exclude=()))
        self.see(e.AllocationSubmitted(allocation=name, job="77", adopted=False))
        running = e.AllocationChanged(allocation=name, status=AllocationStatus.RUNNING, nodes=held, reason="")
        self.see(running, seconds=seconds)
        return self

    def launch(
        self, attempt: str, checkpoint: Checkpoint | None = None, incident: str | None = None, *nodes: str
    ) -> Told:
        run = attempt.partition("-")[0]
        self.see(
            e.AttemptIntended(
                attempt=attempt,
                run=run,
                nodes=nodes or ("n1", "n2"),
                ranks_per_node=1,
                checkpoint=checkpoint,
                incident=incident,
            )
        )
        self.see(e.AttemptStarted(attempt=attempt, at=self.now + 1))
        versions = {"python": "3.11.7", "torch": "2.13.0"}
        configured = e.AttemptConfigured(
            attempt=attempt,
            steps=self.steps,
            schedule=self.schedule,
            optimizer=OPTIMIZER,
            versions=versions,
            layout={"world": 2, "dp": 2, "tp": 1},
        )
        self.see(configured, seconds=3.0)
        return self

    def train(
        self,
        attempt: str,
        first: int,
        last: int,
        loss: Callable[[int], float | None] = falling,
        journal: bool = True,
        valid: Callable[[int], dict[str, float | None] | None] = lambda _: None,
    ) -> Told:
        """Telemetry of the steps from `first` to `last`, and the progress that the daemon would journal."""
        run = self.state.runs[attempt.partition("-")[0]]
        schedule, optimizer = with_settings(self.schedule, OPTIMIZER, run.settings)
        used = {"betas": optimizer.betas, "weight_decay": optimizer.weight_decay, "clip_norm": optimizer.clip_norm}
        path = self.folder / attempt_folder(attempt) / "telemetry.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        known = self.state.attempts[attempt]
        lines: list[str] = []
        readbacks: list[Readback] = []
        first_at = self.now + self.step_seconds
        for step in range(first, last + 1):
            self.now += self.step_seconds
            lr, value = expected_lr(schedule, run.lr_factors, step), loss(step)
            lines.append(json.dumps(self._line(step, lr, value) | used | {"valid": valid(step)}) + "\n")
            if len(readbacks) < 5:
                readbacks.append(Readback(step=step, lr=lr, loss=value, **used))
        with path.open("a") as file:
            file.writelines(lines)
        if journal:
            began = known.members and known.members[-1].step is not None and known.members[-1].first_step is None
            of_generation = {
                "generation": known.generation,
                "generation_first_step": first,
                "generation_first_at": first_at,
                "generation_readbacks": tuple(readbacks),
            }
            self.see(
                e.AttemptProgressed(
                    attempt=attempt,
                    first_step=known.first_step or first,
                    first_step_at=known.first_step_at or first_at,
                    step=last,
                    at=self.now,
                    readbacks=() if known.readbacks else tuple(readbacks),
                    **(of_generation if began else {}),
                ),
                seconds=0.0,
            )
        return self

    def _line(self, step: int, lr: float, loss: float | None) -> dict[str, Any]:
        return {
            "ts": round(self.now, 3),
            "num_updates": step,
            "loss": loss,
            "gnorm": None if loss is None else round(0.5 + loss / 4, 4),
            "lr": lr,
            "loss_scale": None,
            "finite": loss is not None,
            "step_seconds": self.step_seconds,
            "wps": 1000.0,
            "tokens": self.tokens(step),
        }

    def save(self, run: str, step: int, healthy: bool = True, why: str = "") -> Checkpoint:
        point = Checkpoint(run=run, step=step, path=f"/ckpt/{self.lineage}/{run}/{step}")
        self.see(e.CheckpointSeen(checkpoint=point), e.CheckpointVerified(checkpoint=point, healthy=healthy, why=why))
        return point

    def evaluated(self, step: int, run: str | None = None, **more: Any) -> Told:
        """A score of a checkpoint, of the newest run if no other is named."""
        self.see(evaluated(run or list(self.state.runs)[-1], step, **more))
        return self

    def sampled(self, step: int, *texts: tuple[str, str, str], run: str | None = None, **more: Any) -> Told:
        """Prompts with a greedy and a drawn completion."""
        completions = [Completion(prompt=prompt, greedy=greedy, drawn=drawn) for prompt, greedy, drawn in texts]
        self.see(sampled(run or list(self.state.runs)[-1], step, *completions, **more))
        return self

    def end(self, attempt: str, outcome: Outcome, last: int | None) -> Told:
        at = self.now if last is not None else None
        self.see(e.AttemptEnded(attempt=attempt, outcome=outcome, last_step=last, last_step_at=at, exits=()))
        return self

    def incident(self, kind: str, cause: str, attempt: str | None, step: int | None, **more: Any) -> str:
        name = f"{self.lineage}-i{len(self.state.incidents):03d}"
        fields: dict[str, Any] = {"onset_step": None, "nodes": (), "evidence": {}, "drill": None, **more}
        opened = e.IncidentOpened(
            incident=name,
            failure=kind,
            cause=cause,
            detector="the detector's rule",
            attempt=attempt,
            step_failed=step,
            at=self.now - 0.5,
            **fields,
        )
        self.see(opened, seconds=0.5)
        return name

    def decide(self, incident: str, action: Action, why: str = "0 of 5 actions spent", **more: Any) -> Told:
        fields: dict[str, Any] = {"playbook": "a_playbook", "version": 1, "rung": 0, **more}
        self.see(e.RecoveryDecided(incident=incident, action=action, why=why, **fields), seconds=0.1)
        return self

    def close(self, incident: str, proven: bool = True, mismatch: str = "") -> Told:
        """With the proof that the attempt's first updates give."""
        known = self.state.incidents[incident]
        after = self.state.attempts[known.next_attempt or ""]
        hit = self.state.attempts[known.attempt or ""]
        factors = self.state.runs[after.run].lr_factors
        proof: dict[str, Any] = {
            "attempt": after.name,
            "readbacks": [
                {"step": r.step, "lr": r.lr, "expected_lr": expected_lr(self.schedule, factors, r.step), "loss": r.loss}
                for r in after.readbacks
            ],
        }
        if mismatch:
            proof["mismatch"] = mismatch
        resumed = (after.first_step or 1) - 1
        self.see(
            e.IncidentClosed(
                incident=incident,
                proven=proven,
                proof=proof,
                step_resumed=resumed,
                steps_lost=(hit.last_step or 0) - resumed,
                seconds_down=(after.first_step_at or 0.0) - (hit.last_step_at or 0.0),
            )
        )
        return self


def spiked(told: Told) -> Told:
    """Trained to 200, a spike at 160, rolled back to 100 with half the learning rate, and proven."""
    told.begin().plan("12.00").hold().launch("12.00-a0").train("12.00-a0", 1, 200)
    point = told.save("12.00", 100)
    told.save("12.00", 150, healthy=True)
    incident = rolled_back(told, point)
    return told.train("12.01-a0", 101, 140).close(incident)


def rolled_back(told: Told, point: Checkpoint) -> str:
    """A spike at 160, seen at 200: the next attempt begins at `point` with half the learning rate. The incident."""
    incident = told.incident("loss_spike", "loss 9.1 at step 200", "12.00-a0", 200, onset_step=160)
    told.decide(incident, Action.ROLLBACK, checkpoint=point, lr_factor=0.5).end("12.00-a0", Outcome.STOPPED, 200)
    told.plan("12.01", "12.00", point, [(point.step, 0.5)], incident, cause="loss 9.1 at step 200")
    told.launch("12.01-a0", point, incident)
    return incident
