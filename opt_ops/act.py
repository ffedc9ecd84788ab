"""The supervisor's hands: carry out the open intents of a state, and say what came of them.

An intent of this life that was not tried yet is tried. One that an earlier life left open is settled by asking the
world: a job of that name exists or it does not. Everything that the node agents do follows from one file of orders,
which is a projection of the state, so that ordering twice is ordering once.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from opt_ops.core.events import AllocationFailed, AllocationSubmitted, DrillDone, Event, NodeDrained
from opt_ops.core.run import Allocation, Attempt, State, attempt_folder
from opt_ops.core.values import AllocationStatus, Fault
from opt_ops.errors import Refused, SchedulerUnavailable
from opt_ops.ports import Drilling, Launch, Orders, Ports

_CANCEL_SECONDS = 20.0  # for agents to leave by themselves before the job is cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How a trainer is started here."""

    folder: str  # of the lineage
    trainer: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])


class Hands:
    """Acts for one lineage, for one life of the daemon."""

    def __init__(self, ports: Ports, site: Site) -> None:
        self._ports = ports
        self._site = site
        self._ordered: Orders | None = None
        self._tried: set[str] = set()

    def act(self, state: State) -> Iterator[Event]:
        """Carry out what is open; yield the outcomes."""
        self._order(state)
        yield from self._allocation(state)
        yield from self._drains(state)
        yield from self._drills(state)

    def _order(self, state: State) -> None:
        orders = orders_of(state, self._site)
        before = self._ordered
        if before is not None and (orders.launch, orders.drills, orders.release) == (
            before.launch,
            before.drills,
            before.release,
        ):
            return
        self._ports.agents.order(orders)
        self._ordered = orders

    def _allocation(self, state: State) -> Iterator[Event]:
        allocation, scheduler = state.allocation, self._ports.scheduler
        if allocation is None or not allocation.live:
            return
        try:
            if allocation.job is not None:
                if self._must_cancel(allocation):
                    scheduler.cancel(allocation.job)
            elif allocation.epoch == state.epoch and allocation.name not in self._tried:
                self._tried.add(allocation.name)
                job = scheduler.submit(allocation.name, allocation.wanted, allocation.exclude)
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=False)
            elif (job := scheduler.find(allocation.name)) is not None:
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=True)
            elif self._ports.clock.now() - allocation.intended_at > scheduler.grace_seconds:
                yield AllocationFailed(allocation=allocation.name, why="no job of that name came of an earlier try")
        except SchedulerUnavailable:
            return  # not an outcome: ask again at the next tick
        except Refused as error:
            yield AllocationFailed(allocation=allocation.name, why=str(error))

    def _must_cancel(self, allocation: Allocation) -> bool:
        """Agents leave by themselves when released; a job that has none yet, or that lingers, is cancelled."""
        if allocation.release_at is None:
            return False
        queued = allocation.status is AllocationStatus.QUEUED
        return queued or self._ports.clock.now() - allocation.release_at > _CANCEL_SECONDS

    def _drains(self, state: State) -> Iterator[Event]:
        for node in state.nodes.values():
            if node.drain != "intended":
                continue
            try:
                self._ports.scheduler.drain(node.name, f"opt-ops {node.excluded_by}: {node.reason}")
            except SchedulerUnavailable:
                continue
            except Refused as error:
                yield NodeDrained(node=node.name, done=False, why=str(error))
            else:
                yield NodeDrained(node=node.name, done=True, why="")

    def _drills(self, state: State) -> Iterator[Event]:
        for drill in state.drills.values():
            if drill.done:
                continue
            if drill.fault is Fault.KILL_DAEMON:
                if drill.epoch == state.epoch:
                    os.kill(os.getpid(), signal.SIGKILL)  # the next life settles it
                continue
            if drill.fault is Fault.LR and drill.attempt is not None:
                injected = {"id": drill.name, "kind": "lr", **drill.arguments}
                self._ports.trainer.inject(drill.attempt, [injected])
            yield DrillDone(drill=drill.name)  # the agents' drills are in the orders written above


def orders_of(state: State, site: Site) -> Orders:
    """What the agents should be doing, by the state alone."""
    attempt = state.attempt
    running = attempt if attempt is not None and attempt.live and attempt.stop_why is None else None
    drills = tuple(
        Drilling(
            drill=drill.name,
            fault=drill.fault,
            node=drill.arguments.get("node"),
            arguments={"attempt": drill.attempt, **drill.arguments},
        )
        for drill in state.drills.values()
        if running is not None and drill.attempt == running.name and drill.fault in (Fault.KILL_RANK, Fault.XID)
    )
    allocation = state.allocation
    return Orders(
        epoch=state.epoch,
        seq=state.seq,
        launch=_launch(state, running, site) if running else None,
        drills=drills,
        release=allocation is not None and allocation.release_at is not None,
    )


def _launch(state: State, attempt: Attempt, site: Site) -> Launch:
    lineage = state.lineage
    assert lineage is not None
    argv = [*site.trainer, "--recipe", lineage.recipe]
    for setting in lineage.settings:
        argv += ["--set", setting]
    for path in lineage.data:
        argv += ["--data", path]
    if lineage.tokenizer is not None:
        argv += ["--tokenizer", lineage.tokenizer]
    for factor in state.runs[attempt.run].lr_factors:
        argv += ["--lr-factor", f"{factor.step}:{factor.factor!r}"]
    argv += ["--run-dir", f"{site.folder}/{attempt_folder(attempt.name)}"]
    argv += ["--checkpoint-dir", f"{site.folder}/{attempt.run}/checkpoints"]
    argv += ["--resume", attempt.checkpoint.path] if attempt.checkpoint else ["--from-scratch"]
    argv += ["--attempt", attempt.name]
    # A new port for every attempt, the same for every writing of the same order: a port that is taken costs one retry.
    port = 20000 + zlib.crc32(f"{site.folder} {attempt.name} {attempt.intended_at}".encode()) % 12000
    return Launch(
        attempt=attempt.name,
        nodes=attempt.nodes,
        ranks_per_node=attempt.ranks_per_node,
        address=state.nodes[attempt.nodes[0]].host,
        port=port,
        argv=tuple(argv),
        environment=site.environment,
    )
