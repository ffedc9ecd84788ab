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
from contextlib import suppress
from dataclasses import dataclass, field, replace

from opt_ops.core.events import (
    AlertSettled,
    AllocationFailed,
    AllocationSubmitted,
    DrillDone,
    Event,
    NodeDrained,
    StrayCancelled,
)
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.model import Allocation, Attempt, Node, State
from opt_ops.core.values import AllocationStatus, Fault
from opt_ops.core.waiting import still_waiting
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable
from opt_ops.ports import Alert, Drilling, Launch, Orders, Ports

_CANCEL_SECONDS = 20.0  # for agents to leave by themselves before the job is cancelled
_CANCEL_RETRY_SECONDS = 30.0
_ALERT_RETRY_SECONDS = 60.0
_ALERT_HOURS = 1.0  # after which a page that nobody takes is given up

_TRAINERS_DRILLS = (Fault.LR, Fault.FLIP_BIT)
_AGENTS_DRILLS = (Fault.KILL_RANK, Fault.HANG, Fault.XID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How a trainer is started here."""

    folder: str  # of the lineage
    trainer: tuple[str, ...]
    burn_in_seconds: float = 0.0  # that agents test their nodes for, before anything starts there
    environment: dict[str, str] = field(default_factory=dict[str, str])
    snapshot_dir: str = ""  # on nodes' own disks; empty: none
    checkpoint_copy: str = ""  # a second place for checkpoints; empty: none


class IntentExecutor:
    """Acts for one lineage, for one life of the daemon."""

    def __init__(self, ports: Ports, site: Site) -> None:
        self._ports = ports
        self._site = site
        self._ordered: Orders | None = None
        self._tried: set[str] = set()
        self._cancelled: dict[str, float] = {}  # when each job was last, on the monotonic clock
        self._alerts: dict[str, float] = {}  # when each was last handed over

    def execute(self, state: State) -> Iterator[Event]:
        """Carry out what is open; yield the outcomes."""
        self._write_orders(state)
        for allocation in state.live_allocations:
            yield from self._settle_allocation(state, allocation)
        yield from self._cancel_orphan_jobs(state)
        yield from self._drain_nodes(state)
        yield from self._inject_drills(state)
        yield from self._deliver_alerts(state)

    def _write_orders(self, state: State) -> None:
        orders = orders_of(state, self._site)
        before = self._ordered
        if before is not None and replace(before, epoch=orders.epoch, seq=orders.seq) == orders:
            return
        self._ports.agents.order(orders)
        self._ordered = orders

    def _settle_allocation(self, state: State, allocation: Allocation) -> Iterator[Event]:
        scheduler = self._ports.scheduler
        try:
            if allocation.job is not None:
                if self._must_cancel(allocation):
                    self._cancel(allocation.job)
            elif allocation.epoch == state.epoch and allocation.name not in self._tried:
                self._tried.add(allocation.name)
                job = scheduler.submit(allocation.name, allocation.wanted, allocation.exclude)
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=False)
            elif (job := self._find(allocation.name)) is not None:
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=True)
            elif not still_waiting(self._ports.clock.now(), allocation.intended_at, scheduler.grace_seconds):
                yield AllocationFailed(allocation=allocation.name, why="no job of that name came of an earlier try")
        except NotYet:
            self._tried.discard(allocation.name)
        except SchedulerUnavailable:
            return  # not an outcome: ask again at the next tick
        except Refused as error:
            yield AllocationFailed(allocation=allocation.name, why=str(error))

    def _cancel(self, job: str) -> None:
        """A job may take minutes to complete: the scheduler is not asked at every tick."""
        now = self._ports.clock.monotonic()
        if now - self._cancelled.get(job, -_CANCEL_RETRY_SECONDS) >= _CANCEL_RETRY_SECONDS:
            self._ports.scheduler.cancel(job)
            self._cancelled[job] = now

    def _find(self, allocation: str) -> str | None:
        return next((job for job, name in self._ports.scheduler.jobs() if name == allocation), None)

    def _cancel_orphan_jobs(self, state: State) -> Iterator[Event]:
        for job in state.orphan_jobs:
            try:
                self._ports.scheduler.cancel(job)
            except SchedulerUnavailable:
                continue
            yield StrayCancelled(job=job)

    def _must_cancel(self, allocation: Allocation) -> bool:
        """Agents leave by themselves when released; a job that has none yet, or that lingers, is cancelled."""
        if allocation.release_at is None:
            return False
        queued = allocation.status is AllocationStatus.QUEUED
        return queued or not still_waiting(self._ports.clock.now(), allocation.release_at, _CANCEL_SECONDS)

    def _drain_nodes(self, state: State) -> Iterator[Event]:
        for node in state.nodes.values():
            if node.drain != "intended":
                continue
            try:
                self._remove_dead_node(state, node)
                self._ports.scheduler.drain(node.name, f"opt-ops {node.excluded_by}: {node.reason}")
            except SchedulerUnavailable:
                continue
            except Refused as error:
                yield NodeDrained(node=node.name, done=False, why=str(error))
            else:
                yield NodeDrained(node=node.name, done=True, why="")

    def _remove_dead_node(self, state: State, node: Node) -> None:
        holder = state.held.get(node.name)
        if node.reason != "silent" or holder is None or holder.job is None:
            return
        # a job that cannot do without the node keeps it: nothing starts there any more
        with suppress(Refused):
            self._ports.scheduler.remove_node(holder.job, node.name)

    def _deliver_alerts(self, state: State) -> Iterator[Event]:
        """Hand open alerts over, again after a while if they did not arrive; not for ever."""
        now = self._ports.clock.monotonic()
        failed = dict(self._ports.notifier.delivered())
        for name, alert in state.alerts.items():
            if alert.delivered is not None:
                continue
            problem = failed.get(name)
            if problem == "":
                yield AlertSettled(alert=name, delivered=True, why="")
            elif problem and self._ports.clock.now() - alert.at > _ALERT_HOURS * 3600:
                yield AlertSettled(alert=name, delivered=False, why=problem)
            elif now - self._alerts.get(name, -_ALERT_RETRY_SECONDS) >= _ALERT_RETRY_SECONDS:
                self._alerts[name] = now
                told = alert.told
                self._ports.notifier.send(Alert(told.alert, told.severity, told.title, told.body))

    def _inject_drills(self, state: State) -> Iterator[Event]:
        for drill in state.drills.values():
            if drill.done:
                continue
            if drill.fault is Fault.KILL_DAEMON:
                if drill.epoch == state.epoch:
                    os.kill(os.getpid(), signal.SIGKILL)  # the next life settles it
                continue
            if drill.fault in _TRAINERS_DRILLS and drill.attempt is not None:
                injected = {"id": drill.name, "kind": str(drill.fault), **drill.arguments}
                self._ports.trainer.inject(drill.attempt, [injected])
            yield DrillDone(drill=drill.name)  # the agents' drills are in the orders written above


def orders_of(state: State, site: Site) -> Orders:
    """What the agents should be doing, by the state alone."""
    attempt = state.attempt
    live = attempt if attempt is not None and attempt.live and attempt.nodes else None
    running = live if live is not None and live.stop_why is None else None
    drills = tuple(
        Drilling(
            drill=drill.name,
            fault=drill.fault,
            node=drill.arguments.get("node"),
            arguments={"attempt": drill.attempt, **drill.arguments},
        )
        for drill in state.drills.values()
        if running is not None and drill.attempt == running.name and drill.fault in _AGENTS_DRILLS
    )
    asked = (i.name for i in state.incidents.values() if i.stacks_at is not None and i.stacks is None)
    return Orders(
        epoch=state.epoch,
        seq=state.seq,
        launch=_launch(state, running, site) if running else None,
        drills=drills,
        released=tuple(name for name, each in state.allocations.items() if not each.live or each.release_at),
        save=f"{running.name}/{running.leave_seq}" if running and running.leave_seq else None,
        dump=next(asked, None) if live else None,
        burn_in_seconds=site.burn_in_seconds,
    )


def _launch(state: State, attempt: Attempt, site: Site) -> Launch:
    lineage, run, held = state.intent, state.runs[attempt.run], state.held
    argv = [*site.trainer, "--recipe", lineage.recipe]
    for setting in (*lineage.settings, *run.settings):
        argv += ["--set", setting]
    for path in lineage.data:
        argv += ["--data", path]
    for path in lineage.valid:
        argv += ["--valid", path]
    if lineage.tokenizer is not None:
        argv += ["--tokenizer", lineage.tokenizer]
    for factor in run.lr_factors:
        argv += ["--lr-factor", f"{factor.step}:{factor.factor!r}"]
    for skip in run.skips:
        argv += ["--skip-batches", f"{skip.first}:{skip.last}"]
    argv += ["--run-dir", f"{site.folder}/{attempt_folder(attempt.name)}"]
    argv += ["--checkpoint-dir", f"{site.folder}/{attempt.run}/checkpoints"]
    if site.snapshot_dir:
        argv += ["--snapshot-dir", f"{site.snapshot_dir}/{lineage.lineage}"]
    if site.checkpoint_copy:
        argv += ["--checkpoint-copy", f"{site.checkpoint_copy}/{lineage.lineage}/{attempt.run}"]
    argv += ["--resume", attempt.checkpoint.path] if attempt.checkpoint else ["--from-scratch"]
    argv += ["--attempt", attempt.name, "--fence", f"{site.folder}/attempt.json"]
    # A new port for every attempt, the same for every writing of the same order: a port that is taken costs one retry.
    port = 20000 + zlib.crc32(f"{site.folder} {attempt.name} {attempt.intended_at}".encode()) % 12000
    return Launch(
        attempt=attempt.name,
        nodes=attempt.nodes,
        holders={node: held[node].name for node in attempt.nodes if node in held},
        ranks_per_node=attempt.ranks_per_node,
        address=state.nodes[attempt.nodes[0]].host,
        port=port,
        argv=tuple(argv),
        environment=site.environment,
    )
