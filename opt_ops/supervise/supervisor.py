"""The supervisor of one lineage: observe → journal → fold → decide → act. A start is a recovery from the journal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from opt_ops import __version__
from opt_ops.core.decide.alerts import alert
from opt_ops.core.decide.evaluation import to_come
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.rules import decide
from opt_ops.core.events import DaemonStarted, Entry, Event, LeaveIntended, ProposalMade, kind_of
from opt_ops.core.health.recurrence import remembered
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import last_is_unread
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import SNAPSHOT_EVENTS, Fenced, Journal, JournalError, replayed
from opt_ops.supervise.executor import IntentExecutor, Site
from opt_ops.supervise.guard import Guard
from opt_ops.supervise.operator_requests import RequestWatch, refused
from opt_ops.supervise.watch_allocation import AllocationWatch
from opt_ops.supervise.watch_attempt import AttemptWatch
from opt_ops.supervise.watch_evaluations import EvaluationWatch
from opt_ops.supervise.watch_inputs import InputWatch
from opt_ops.supervise.watch_members import MembersWatch
from opt_ops.supervise.watch_nodes import NodeWatch
from opt_ops.supervise.watch_probes import ProbeWatch
from opt_ops.supervise.watch_proposals import ProposalWatch, with_due
from opt_ops.supervise.watch_training import TrainingWatch

_REWRITE_SECONDS = 10.0  # between two times that orders are written again because agents refuse them
log = logging.getLogger(__name__)

_ROUNDS = 20  # of decide and act in one tick; a state that never settles is a bug and must not hold up the daemon


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonIdentity:
    """Which daemon process this is, and when the one before it last showed liveness (seconds since the epoch)."""

    host: str
    pid: int
    last_liveness: float | None


class Watcher(Protocol):
    """Observes one part of the world."""

    def observe(self, state: State) -> Iterable[Event]:
        """Yield events for what is new."""
        ...


class EventRefused(ValueError):
    """An event that the journal does not take, or that cannot follow the state."""


class Supervisor:
    """Supervises one lineage in one daemon process.

    Each watcher, each hand of the executor and the decisions are guarded by themselves (`guard.py`). Only the journal
    ends a supervisor.
    """

    def __init__(self, folder: Path, ports: Ports, policy: Policy, site: Site, identity: DaemonIdentity) -> None:
        """Take over the lineage: begin a new journal file, fold all earlier ones, and journal the takeover.

        Raises:
            Fenced: another daemon process takes over at this moment.
            JournalError: the journal is damaged or of a newer version.
            OSError: the journal cannot be written.
        """
        self._clock = ports.clock
        self._policy = policy
        self._finished_at: float | None = None  # monotonic
        self._rewritten_at = ports.clock.monotonic() - _REWRITE_SECONDS
        self._identity = identity
        self._journal = Journal(folder / "journal")
        entries, self.notes = self._journal.entries, self._journal.notes
        self._journal.entries = []  # a lineage of weeks has hundreds of thousands of entries
        try:
            self.state = replayed(folder / "journal", entries)
            self._snapshot_seq = 0
            self._guard = guard = Guard(ports.clock, (Fenced, JournalError))
            watched_until = self._watched_until(entries)
            self._training = training = TrainingWatch(policy, ports.trainer, ports.checkpoints, ports.clock, guard)
            allocation = AllocationWatch(ports.scheduler, training, ports.clock)
            histories = remembered(entries)
            nodes = NodeWatch(policy, allocation, training, ports.agents, ports.clock, histories, guard)
            self._requests = RequestWatch(ports.inbox, lambda: max(ports.clock.now(), watched_until or 0.0))
            attempts = AttemptWatch(policy, ports.agents, nodes, training, ports.clock, guard)
            self._watchers: dict[str, Watcher] = {
                "the watch over jobs": allocation,
                "the watch over nodes": nodes,
                "the watch over replacements": MembersWatch(policy, ports.trainer, ports.agents, ports.clock, guard),
                "the watch over training": training,
                "the watch over ranks": attempts,
                "the watch over probes": ProbeWatch(ports.trainer, ports.agents, ports.checkpoints, ports.clock),
                "the watch over evaluations": EvaluationWatch(nodes, ports.evaluations, ports.checkpoints),
                "the watch over proposals": ProposalWatch(ports.checkpoints, ports.clock, watched_until or 0.0),
                "the watch over inputs": InputWatch(ports.inputs, ports.clock),
            }
            self._nodes = nodes
            self._executor = IntentExecutor(ports, site, self._journal.check_fence)
            self._begin(None if watched_until is None else max(0.0, ports.clock.now() - watched_until))
        except Exception:
            self._journal.withdraw()
            raise

    def _begin(self, unwatched: float | None) -> None:
        identity = self._identity
        self._record(
            DaemonStarted(
                host=identity.host,
                pid=identity.pid,
                version=__version__,
                policy=self._policy.version,
                blind_seconds=unwatched,
            )
        )

    def _watched_until(self, entries: Sequence[Entry]) -> float | None:
        """When an earlier daemon process last gave a sign, by its clock; None if none has watched this lineage."""
        return max(entries[-1].ts, self._identity.last_liveness or 0.0) if entries else None

    def tick(self) -> bool:
        """Observe, decide and act once. Returns whether anything was journaled.

        Raises:
            Fenced: this process does not own the lineage any more. It must not act.
            OSError: the journal cannot be written.
        """
        before = self.state.seq
        self._journal.check_fence()
        self._journal.show_life(self._clock.monotonic())
        self._read_requests()
        for name, watcher in self._watchers.items():
            self._take(name, lambda watcher=watcher: watcher.observe(self.state))
        self._outrank_foreign_orders()
        self._rewrite_refused_orders()
        for _ in range(_ROUNDS):
            round_began = self.state.seq
            self._decide()
            for name, act in self._executor.hands(self.state):
                self._take(name, act)
            if self.state.seq == round_began:
                break
        self._tell_failures()
        if self.state.seq - self._snapshot_seq >= SNAPSHOT_EVENTS:
            self._save_snapshot()
        return self.state.seq > before

    def _save_snapshot(self) -> None:
        self._snapshot_seq = self.state.seq
        self._journal.save_snapshot(self.state)

    def _take(self, part: str, found: Callable[[], Iterable[Event]]) -> bool:
        """Journal what a part of the watch yields. Returns whether nothing of it was refused.

        A refused event is dropped, and the next ones are taken.
        """
        whole = True
        for event in self._guard.each(part, found):
            try:
                self._record(event)
            except EventRefused as error:
                self._guard.failed(part, error)
                whole = False
        return whole

    def _read_requests(self) -> None:
        for event in self._guard.each("the watch over requests", lambda: self._requests.observe(lambda: self.state)):
            try:
                self._record(event)
            except EventRefused as error:
                self._guard.failed("the watch over requests", error)
                self._try_record(refused(event, str(error)))

    def _decide(self) -> None:
        for _ in range(_ROUNDS):
            before = self.state.seq
            if not self._take("decisions", self._next_decision):
                break
            if self.state.seq == before:
                break
        if "decisions" in self.state.failing:  # nothing else would tell of it
            self._take("alerts", self._next_alert)

    def _next_decision(self) -> Iterator[Event]:
        event = decide(self.state, self._clock.now(), self._policy)
        if isinstance(event, LeaveIntended):  # the attempt may end once every step up to now is saved
            yield from self._training.report_progress(self.state.attempts[event.attempt])
        if event is not None:
            yield with_due(event, self._clock) if isinstance(event, ProposalMade) else event

    def _next_alert(self) -> Iterator[Event]:
        if self.state.lineage is not None and (told := alert(self.state, self._clock.now(), self._policy)) is not None:
            yield told

    def _tell_failures(self) -> None:
        for event in list(self._guard.news(self.state)):
            self._try_record(event)

    def _try_record(self, event: Event) -> None:
        """Journal what tells of a failure. If even that is refused, the log says so."""
        try:
            self._record(event)
        except EventRefused:
            log.exception("an event about a failure was refused")

    def _record(self, event: Event) -> None:
        """Journal an event and fold it.

        Raises:
            EventRefused: it cannot follow the state, or no reader could take it. Nothing was written.
            Fenced, OSError: the journal cannot be written.
        """
        try:
            # Fold first, then write: an event that cannot follow the state must never reach the journal.
            entry = self._journal.stamp(event, self._clock.now())
            state = fold(self.state, entry)
        except Exception as error:  # broad on purpose: both only compute, and their faults end no supervisor
            raise EventRefused(f"the event {kind_of(event)} was refused: {type(error).__name__}: {error}") from error
        self._journal.append(entry)
        self.state = state

    def _outrank_foreign_orders(self) -> None:
        """Take a higher epoch if node agents follow orders that this process never wrote: they would obey nobody else.

        Such orders come from a restored backup, or are forged.
        """
        seen = max((self._nodes.orders_seen(node) for node in self.state.held), default=(0, 0))
        if seen <= (self.state.epoch, self.state.seq):
            return
        log.error("%s: agents follow foreign orders of epoch %d; outranking them", self._journal.lineage, seen[0])
        if not self._journal.move_above(seen[0]):
            return
        self._executor.forget_orders()
        self._begin(unwatched=0.0)

    def _rewrite_refused_orders(self) -> None:
        """Write the orders again if agents refuse the file that is there: somebody has damaged or replaced it."""
        refused = {node: why for node in self.state.held if (why := self._nodes.orders_refused(node))}
        now = self._clock.monotonic()
        if refused and now - self._rewritten_at >= _REWRITE_SECONDS:
            node, why = next(iter(refused.items()))
            lineage = self._journal.lineage
            log.error("%s: orders.json is written again: the agent of %s refuses it: %s", lineage, node, why)
            self._rewritten_at = now
            self._executor.forget_orders()

    @property
    def settled(self) -> bool:
        """Whether the lineage holds nothing any more, and its last checkpoint has a verdict.

        A lineage that was stopped or halted waits for that verdict, too, but not for ever. Pages that are not delivered
        yet are not waited for: `finished` waits for them.
        """
        if not self.state.settled:
            return False
        if self._finished_at is None:
            self._finished_at = self._clock.monotonic()
        waited = self._clock.monotonic() - self._finished_at
        return waited > self._policy.final_examine_seconds or not last_is_unread(self.state)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do for this lineage."""
        return self.settled and self.state.finished and not to_come(self.state, self._clock.now(), self._policy)

    def retry_pages(self) -> None:
        """Another message was delivered: pages that wait are sent again at once."""
        self._executor.retry_pages()

    def close(self) -> None:
        """Close the journal file, and leave a snapshot of the state for the commands that read it."""
        if self.state.seq > self._snapshot_seq:
            self._save_snapshot()
        self._journal.close()


def preview(state: State, event: Event, now: float, policy: Policy) -> Sequence[Event]:
    """The events that would be journaled if `event` happened now: the same `decide`, on a copy of the state."""
    events: list[Event] = []
    coming: Event | None = event
    while coming is not None and len(events) < _ROUNDS:
        state = fold(state, Entry(seq=state.seq + 1, epoch=state.epoch, ts=now, event=coming))
        events.append(coming)
        coming = decide(state, now, policy)
    return events
