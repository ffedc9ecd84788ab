"""Carries out the open intents of a state, and yields their outcomes.

An intent of this daemon process that was not tried yet is tried. For an intent that an earlier daemon process left
open, the scheduler is asked: a job of that name exists or it does not. Node agents read one file of orders, which is a
projection of the state. Writing the same orders twice changes nothing.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from opt_ops.contract.warm_start import CAPABILITY as WARM_START
from opt_ops.core.decide.replacement import is_capable
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
from opt_ops.core.state.attempts import Attempt, Run
from opt_ops.core.state.data import data_words
from opt_ops.core.state.model import AlertState, Allocation, Drill, Node, State
from opt_ops.core.state.queries import probing
from opt_ops.core.values import AllocationStatus, Fault, LrFactor, Skip, Status, Verdict
from opt_ops.core.waiting import Backoff, Retries, still_waiting
from opt_ops.errors import NotYet, Refused, SchedulerUnavailable
from opt_ops.ports import Alert, Drilling, Launch, Membership, Orders, Ports
from opt_ops.supervise.deliveries import Deliveries
from opt_ops.supervise.evaluation_orders import EvaluationCommand, evaluation_order

_LEAVE_SECONDS = 20.0  # for released agents to leave by themselves before their job is cancelled
_CANCEL_BACKOFF = Backoff(first=30.0)  # a job may take minutes to complete: the scheduler is not asked at every tick

_NEVER = 10**9  # steps between two checkpoints of a probe

_TRAINERS_DRILLS = (Fault.LR, Fault.NAN, Fault.FLIP_BIT, Fault.SLOW_STANDBY)
_AGENTS_DRILLS = (Fault.KILL_RANK, Fault.KILL_NODE, Fault.KILL_PAIR, Fault.HANG, Fault.XID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """How a trainer is started at this site."""

    folder: str  # of the lineage
    trainer: tuple[str, ...]
    burn_in_seconds: float = 0.0  # for which agents test their nodes before anything starts there
    environment: dict[str, str] = field(default_factory=dict[str, str])
    snapshot_dir: str = ""  # on the nodes' own disks; empty: no snapshots
    checkpoint_copy: str = ""  # second place for checkpoints; empty: none
    in_place: bool = True  # whether ranks wait for a place in a running attempt
    standby: bool = True  # whether nodes keep a warm process of the trainer
    evaluate: EvaluationCommand = field(default_factory=EvaluationCommand)


class IntentExecutor:
    """Acts for one lineage in one daemon process."""

    def __init__(self, ports: Ports, site: Site, check_owner: Callable[[], None] = lambda: None) -> None:
        """`check_owner` raises `Fenced` unless this process owns the lineage; it is called before each effect."""
        self._check_owner = check_owner
        self._ports = ports
        self._site = site
        self._ordered: Orders | None = None
        self._submitted: set[str] = set()
        self._cancellations = Retries(_CANCEL_BACKOFF)
        self._deliveries = Deliveries()

    def hands(self, state: State) -> Iterator[tuple[str, Callable[[], Iterable[Event]]]]:
        """Yield what carries out the open intents, each with its name; each yields the outcomes.

        They are apart, so that one that fails does not hold up the others. All but the last raise `Fenced` if this
        process does not own the lineage any more.
        """
        yield "orders to agents", lambda: self._write_orders(state)
        for allocation in state.live_allocations:
            yield "requests to the scheduler", lambda allocation=allocation: self._submit_or_cancel(state, allocation)
        yield "the cancellation of stray jobs", lambda: self._cancel_orphan_jobs(state)
        for node in state.nodes.values():
            if node.drain == "intended":
                yield "drains of nodes", lambda node=node: self._drain_node(state, node)
        yield "drills", lambda: self._inject_drills(state)
        yield "evaluations", lambda: self._evaluate(state)
        yield "the delivery of alerts", lambda: self._deliver_alerts(state)

    def _write_orders(self, state: State) -> Iterable[Event]:
        orders = orders_of(state, self._site)
        before = self._ordered
        if before is not None and replace(before, epoch=orders.epoch, seq=orders.seq) == orders:
            return ()
        self._check_owner()
        self._ports.agents.order(orders)
        self._ordered = orders
        return ()

    def forget_orders(self) -> None:
        """Write the orders again at the next call, even if they are the same: somebody else has written, too."""
        self._ordered = None

    def _submit_or_cancel(self, state: State, allocation: Allocation) -> Iterator[Event]:
        scheduler = self._ports.scheduler
        try:
            if allocation.job is not None:
                if self._must_cancel(allocation):
                    self._cancel(allocation.job)
            elif allocation.epoch == state.epoch and allocation.name not in self._submitted:
                self._check_owner()
                self._submitted.add(allocation.name)
                job = scheduler.submit(allocation.name, allocation.wanted, allocation.exclude)
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=False)
            elif (job := self._find(allocation.name)) is not None:
                yield AllocationSubmitted(allocation=allocation.name, job=job, adopted=True)
            elif not still_waiting(self._ports.clock.now(), allocation.intended_at, scheduler.grace_seconds):
                yield AllocationFailed(
                    allocation=allocation.name, why="the scheduler has no job of that name from an earlier submission"
                )
        except NotYet:
            self._submitted.discard(allocation.name)
        except SchedulerUnavailable:
            return  # not an outcome: the next tick asks again
        except Refused as error:
            yield AllocationFailed(allocation=allocation.name, why=str(error))

    def _must_cancel(self, allocation: Allocation) -> bool:
        """Whether a released job must be cancelled: it has no agents yet, or they do not leave by themselves."""
        if allocation.release_at is None:
            return False
        queued = allocation.status is AllocationStatus.QUEUED
        return queued or not still_waiting(self._ports.clock.now(), allocation.release_at, _LEAVE_SECONDS)

    def _cancel(self, job: str) -> None:
        now = self._ports.clock.monotonic()
        if self._cancellations.due(job, now):
            self._check_owner()
            self._ports.scheduler.cancel(job)
            self._cancellations.tried(job, now)

    def _find(self, allocation: str) -> str | None:
        return next((job for job, name in self._ports.scheduler.jobs() if name == allocation), None)

    def _cancel_orphan_jobs(self, state: State) -> Iterator[Event]:
        for job in state.orphan_jobs:
            try:
                self._check_owner()
                self._ports.scheduler.cancel(job)
            except SchedulerUnavailable:
                continue
            yield StrayCancelled(job=job)

    def _drain_node(self, state: State, node: Node) -> Iterator[Event]:
        try:
            self._check_owner()
            self._remove_dead_node(state, node)
            self._ports.scheduler.drain(node.name, f"opt-ops {node.excluded_by}: {node.reason}")
        except SchedulerUnavailable:
            return
        except Refused as error:
            yield NodeDrained(node=node.name, done=False, why=str(error))
        else:
            yield NodeDrained(node=node.name, done=True, why="")

    def _remove_dead_node(self, state: State, node: Node) -> None:
        holder = state.held.get(node.name)
        if node.reason != "silent" or holder is None or holder.job is None:
            return
        # A job that needs the node keeps it. The node is excluded, so nothing starts there.
        with suppress(Refused):
            self._ports.scheduler.remove_node(holder.job, node.name)

    def _inject_drills(self, state: State) -> Iterator[Event]:
        for drill in state.drills.values():
            if drill.done:
                continue
            if drill.fault is Fault.KILL_DAEMON:
                if drill.epoch == state.epoch:
                    os.kill(os.getpid(), signal.SIGKILL)  # the next daemon process records the drill as done
                continue
            if _is_trainers(drill) and drill.attempt is not None:
                self._check_owner()
                injected = {"id": drill.name, "kind": str(drill.fault), **drill.arguments}
                self._ports.trainer.inject(drill.attempt, [injected])
            yield DrillDone(drill=drill.name)  # the drills of agents are in the orders, which are written already

    def _evaluate(self, state: State) -> Iterable[Event]:
        """Have the evaluation run that is wanted beside the daemon. Those on nodes are in the orders."""
        order = evaluation_order(state, self._site.evaluate)
        wanted = order if order is not None and order.node is None else None
        if wanted is not None:
            self._check_owner()
        self._ports.evaluations.follow(wanted)
        return ()

    def _deliver_alerts(self, state: State) -> Iterator[Event]:
        """Hand open alerts to the notifier, and again after a pause if delivery failed.

        A page is never given up. It is settled when it is delivered, or when an operator has answered it.
        """
        now = self._ports.clock.monotonic()
        problems = dict(self._ports.notifier.delivered())
        if "" in problems.values():
            self._deliveries.got_through()
        for name, alert in state.alerts.items():
            if alert.delivered is not None:
                continue
            intended, problem = alert.told, problems.get(name)
            if problem == "":
                yield AlertSettled(alert=name, delivered=True, why="")
            elif problem and _answered(state, alert):
                yield AlertSettled(alert=name, delivered=False, why=f"an operator has acted before; {problem}")
            elif problem and self._deliveries.given_up(intended.severity, self._ports.clock.now() - alert.at):
                yield AlertSettled(alert=name, delivered=False, why=problem)
            elif self._deliveries.due(name, intended.severity, now):
                self._check_owner()
                self._deliveries.tried(name, intended.severity, now)
                self._ports.notifier.send(Alert(intended.alert, intended.severity, intended.title, intended.body))

    def retry_pages(self) -> None:
        """A message of another lineage was delivered: pages that wait are sent again at once."""
        self._deliveries.got_through()


def _answered(state: State, alert: AlertState) -> bool:
    """Whether an operator has asked the lineage to go on, or has stopped it, since the alert."""
    return state.asked_at > alert.at or state.status is Status.CANCELLED


def _is_trainers(drill: Drill) -> bool:
    """Whether the trainer injects it, because it reads `drill.json`."""
    return drill.fault in _TRAINERS_DRILLS or drill.arguments.get("in_step") is not None


def _is_agents(drill: Drill) -> bool:
    return drill.fault in _AGENTS_DRILLS and not _is_trainers(drill)


def _hits(drill: Drill, attempt: Attempt) -> bool:
    """Whether it is meant for the present ranks: those that have replaced the ones that it hit are spared."""
    newest = attempt.members[-1].intended_at if attempt.members else 0.0
    return drill.attempt == attempt.name and drill.at >= newest


def orders_of(state: State, site: Site) -> Orders:
    """The orders that follow from the state alone."""
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
        if running is not None and _is_agents(drill) and _hits(drill, running)
    )
    dumps = (i.name for i in state.incidents.values() if i.stacks_at is not None and i.stacks is None)
    evaluation = evaluation_order(state, site.evaluate)
    return Orders(
        epoch=state.epoch,
        seq=state.seq,
        launch=_launch(state, running, site) if running else None,
        drills=drills,
        released=tuple(name for name, each in state.allocations.items() if not each.live or each.release_at),
        save=f"{running.name}/{running.leave_seq}" if running and running.leave_seq else None,
        dump=next(dumps, None) if live else None,
        probes=tuple(_probes(state, site)),
        burn_in_seconds=site.burn_in_seconds,
        evaluate=evaluation if evaluation is not None and evaluation.node is not None else None,
    )


def _launch(state: State, attempt: Attempt, site: Site) -> Launch:
    run, folder = state.runs[attempt.run], site.folder
    argv = _argv(state, site, run, run.settings, run.lr_factors, run.skips)
    argv += ["--run-dir", f"{folder}/{attempt_folder(attempt.name)}"]
    argv += ["--checkpoint-dir", f"{folder}/{attempt.run}/checkpoints"]
    if site.snapshot_dir:
        argv += ["--snapshot-dir", f"{site.snapshot_dir}/{state.intent.lineage}"]
    if site.checkpoint_copy:
        argv += ["--checkpoint-copy", f"{site.checkpoint_copy}/{state.intent.lineage}/{attempt.run}"]
    argv += ["--resume", attempt.checkpoint.path] if attempt.checkpoint else ["--from-scratch"]
    argv += ["--attempt", attempt.name, "--fence", f"{folder}/attempt.json"]
    launch = _launch_of(state, site, attempt.name, attempt.nodes, attempt.ranks_per_node, attempt.intended_at, argv)
    return replace(launch, membership=_membership(attempt, launch, site), **_warm(state, attempt, site))


def _membership(attempt: Attempt, launch: Launch, site: Site) -> Membership | None:
    """The newest generation of the attempt's membership. Each has a port of its own: older ranks cannot meet there."""
    if not attempt.members:
        return None
    newest = attempt.members[-1]
    places = ((node, local) for node in attempt.nodes for local in range(attempt.ranks_per_node))
    return Membership(
        generation=newest.generation,
        ranks=tuple(places),
        new=newest.new,
        address=launch.address,
        port=_port(site, f"{attempt.name}/{newest.generation}", attempt.intended_at),
    )


def _warm(state: State, attempt: Attempt, site: Site) -> dict[str, dict[str, Any]]:
    """Which nodes keep a warm process, and how many warm ranks wait there: after the first step, when memory is known.

    A spare has a warm rank for each of its places. A node in use has one: for a process that dies while the node is
    fit, and where no spare could take its place.
    """
    if not site.standby or WARM_START not in attempt.capabilities or attempt.first_step is None:
        return {}
    held = {name: holder.name for name, holder in state.held.items() if _may_wait(state, name)}
    standbys: dict[str, int] = {}
    if site.in_place and is_capable(attempt):
        standbys = {name: attempt.ranks_per_node for name in held if name not in attempt.nodes}
        if not standbys or attempt.ranks_per_node > 1:
            standbys |= {name: 1 for name in held if name in attempt.nodes}
    return {"warm": held, "standbys": standbys}


def _may_wait(state: State, name: str) -> bool:
    node = state.nodes.get(name)
    return node is not None and node.excluded_by is None and node.verdict not in (Verdict.BAD, Verdict.SUSPECT)


def _probes(state: State, site: Site) -> Iterator[Launch]:
    """The probes that have not ended. They write into a folder of their own, and end when a newer attempt begins."""
    for incident in (state.incidents[name] for name in state.open_incidents if not state.ended):
        intended, attempt = incident.probes, state.attempts.get(incident.attempt or "")
        if not probing(incident) or intended is None or attempt is None:
            continue
        ended = {each.probe for each in incident.probe_ends}
        for probe in intended.probes:
            if probe.kind in ended or probe.node not in state.held or probe.node not in state.nodes:
                continue
            folder = f"{site.folder}/{attempt_folder(intended.name(probe))}"
            # It needs no checkpoint of its own: what it shows is in its telemetry.
            settings = (*probe.settings, f"checkpoint_every={_NEVER}")
            argv = _argv(state, site, state.runs[attempt.run], settings, probe.lr_factors, probe.skips)
            argv += ["--run-dir", folder, "--checkpoint-dir", f"{folder}/checkpoints"]
            argv += ["--resume", intended.checkpoint.path]
            argv += ["--attempt", attempt.name, "--fence", f"{site.folder}/attempt.json"]
            name, ranks = intended.name(probe), attempt.ranks_per_node
            yield _launch_of(state, site, name, (probe.node,), ranks, intended.at, argv)


def _argv(
    state: State, site: Site, run: Run, settings: Sequence[str], factors: Sequence[LrFactor], skips: Sequence[Skip]
) -> list[str]:
    """The trainer's command, as far as it says on what and how to train."""
    lineage = state.intent
    argv = [*site.trainer, "--recipe", lineage.recipe]
    for setting in (*lineage.settings, *settings):
        argv += ["--set", setting]
    argv += data_words(state, run)
    for path in lineage.valid:
        argv += ["--valid", path]
    if lineage.tokenizer is not None:
        argv += ["--tokenizer", lineage.tokenizer]
    if lineage.init_from is not None:  # it stays through all restarts: --resume has precedence
        argv += ["--init-from", lineage.init_from]
    for factor in factors:
        argv += ["--lr-factor", f"{factor.step}:{factor.factor!r}"]
    for skip in skips:
        argv += ["--skip-batches", f"{skip.first}:{skip.last}"]
    return argv


def _launch_of(
    state: State, site: Site, name: str, nodes: tuple[str, ...], ranks: int, since: float, argv: Sequence[str]
) -> Launch:
    """The order to start an attempt, or a probe, that was intended at `since` with so many ranks on each node."""
    return Launch(
        attempt=name,
        nodes=nodes,
        holders={node: state.held[node].name for node in nodes if node in state.held},
        ranks_per_node=ranks,
        address=state.nodes[nodes[0]].host,
        port=_port(site, name, since),
        argv=tuple(argv),
        environment=site.environment,
    )


def _port(site: Site, name: str, since: float) -> int:
    """A new port for each attempt, and the same one whenever its order is written again. A port in use costs a try."""
    return 20000 + zlib.crc32(f"{site.folder} {name} {since}".encode()) % 12000
