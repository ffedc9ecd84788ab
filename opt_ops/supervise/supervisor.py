"""The supervisor of one lineage: observe → journal → fold → decide → act. A start is a recovery from the journal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops import __version__
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.rules import decide
from opt_ops.core.events import DaemonStarted, Entry, Event, LeaveIntended, RequestRefused
from opt_ops.core.health.recurrence import remembered
from opt_ops.core.state.fold import fold, replay
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import last_is_unread
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import Journal, NotJournalable
from opt_ops.supervise.executor import IntentExecutor, Site
from opt_ops.supervise.operator_requests import RequestWatch
from opt_ops.supervise.watch_allocation import AllocationWatch
from opt_ops.supervise.watch_attempt import AttemptWatch
from opt_ops.supervise.watch_nodes import NodeWatch
from opt_ops.supervise.watch_training import TrainingWatch

_REWRITE_SECONDS = 10.0  # between two times that orders are written again because agents refuse them
_ROUNDS = 20  # of decide and act in one tick; a state that never settles is a bug and must not hold up the daemon

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonIdentity:
    """Which daemon process this is, and when the one before it last showed liveness (seconds since the epoch)."""

    host: str
    pid: int
    last_liveness: float | None


class Supervisor:
    """Supervises one lineage in one daemon process."""

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
        self._not_journalable: Event | None = None  # the newest event that no reader of the journal could take
        self._journal = Journal(folder / "journal")
        entries, self.notes = self._journal.entries, self._journal.notes
        self._journal.entries = []  # a lineage of weeks has hundreds of thousands of entries
        try:
            self.state = replay(entries)
            self._training = training = TrainingWatch(policy, ports.trainer, ports.checkpoints, ports.clock)
            allocation = AllocationWatch(ports.scheduler, training, ports.clock)
            histories = remembered(entries)
            nodes = NodeWatch(policy, allocation, training, ports.agents, ports.clock, histories)
            self._requests = RequestWatch(ports.inbox)
            self._watchers = (
                allocation,
                nodes,
                training,
                AttemptWatch(policy, ports.agents, nodes, training, ports.clock),
            )
            self._nodes = nodes
            self._executor = IntentExecutor(ports, site, self._journal.check_fence)
            self._begin(self._unwatched(entries[-1].ts if entries else None))
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

    def _unwatched(self, last_entry: float | None) -> float | None:
        """How long no daemon watched, in seconds; None if none has before."""
        if last_entry is None:
            return None
        return max(0.0, self._clock.now() - max(last_entry, self._identity.last_liveness or 0.0))

    def tick(self) -> bool:
        """Observe, decide and act once. Returns whether anything was journaled.

        Raises:
            Fenced: this process does not own the lineage any more. It must not act.
            IllegalTransition: an event cannot follow the present state.
            OSError: the journal cannot be written.
        """
        before = self.state.seq
        self._journal.check_fence()
        self._journal.show_life(self._clock.monotonic())
        self._read_requests()
        for watcher in self._watchers:
            for event in watcher.observe(self.state):
                self._record(event)
        self._outrank_foreign_orders()
        self._rewrite_refused_orders()
        for _ in range(_ROUNDS):
            round_began = self.state.seq
            self._decide()
            for event in self._executor.execute(self.state):
                self._record(event)
            if self.state.seq == round_began:
                break
        return self.state.seq > before

    def _read_requests(self) -> None:
        before = -1
        while before != self.state.seq:
            before = self.state.seq
            for event in self._requests.observe(self.state):
                if not self._record(event) and (request := getattr(event, "request", None)):
                    why = "it has a value that no reader of the journal could take"
                    self._record(RequestRefused(request=request, author="", verb="", why=why))

    def _decide(self) -> None:
        for _ in range(_ROUNDS):
            event = decide(self.state, self._clock.now(), self._policy)
            if event is None:
                return
            if isinstance(event, LeaveIntended):  # the attempt may end once every step up to now is saved
                for progress in self._training.report_progress(self.state.attempts[event.attempt]):
                    self._record(progress)
            if not self._record(event):
                return

    def _record(self, event: Event) -> bool:
        """Journal an event and fold it. One that no reader could take is left out: the result is False."""
        try:
            entry = self._journal.stamp(event, self._clock.now())
        except NotJournalable as error:
            if event != self._not_journalable:  # a watcher may yield it at each look
                log.error("%s: %s. %s", self._journal.lineage, error, error.hint)
            self._not_journalable = event
            return False
        # Fold first, then write: an event that cannot follow the state must never reach the journal.
        state = fold(self.state, entry)
        self._journal.append(entry)
        self.state = state
        return True

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
        return self.settled and self.state.finished

    def retry_pages(self) -> None:
        """Another message was delivered: pages that wait are sent again at once."""
        self._executor.retry_pages()

    def close(self) -> None:
        """Close the journal file."""
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
