"""One lineage's supervisor: observe → journal → fold → decide → act. Starting it is recovering it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opt_ops import __version__
from opt_ops.core.decide.policy import Policy
from opt_ops.core.decide.rules import decide
from opt_ops.core.events import DaemonStarted, Entry, Event, LeaveIntended
from opt_ops.core.health.recurrence import remembered
from opt_ops.core.state.fold import fold, replay
from opt_ops.core.state.model import State
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import Journal
from opt_ops.supervise.executor import Hands, Site
from opt_ops.supervise.operator_requests import RequestWatch
from opt_ops.supervise.watch_allocation import AllocationWatch
from opt_ops.supervise.watch_attempt import AttemptWatch
from opt_ops.supervise.watch_nodes import NodeWatch
from opt_ops.supervise.watch_training import TrainingWatch

_ROUNDS = 20  # of decide and act in one tick; a state that never settles is a fault of ours, not a reason to spin


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Who this daemon is, and when its predecessor was last known to live (seconds since the epoch)."""

    host: str
    pid: int
    last_sign: float | None


class Supervisor:
    """Supervises one lineage for one life of the daemon."""

    def __init__(self, folder: Path, ports: Ports, policy: Policy, site: Site, life: Life) -> None:
        """Take the lineage over: a new journal file, the state of all earlier ones, and an entry that says so."""
        self._clock = ports.clock
        self._policy = policy
        self._journal = Journal(folder / "journal")
        entries, self.notes = self._journal.entries, self._journal.notes
        self._journal.entries = []  # a lineage of weeks has hundreds of thousands
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
            self._hands = Hands(ports, site)
            self._begin(life, entries[-1].ts if entries else None)
        except Exception:
            self._journal.withdraw()
            raise

    def tick(self) -> bool:
        """One round of looking, deciding and acting. Returns whether anything was journaled.

        Raises:
            Fenced: a newer daemon has taken over; nothing more may be done here.
        """
        before = self.state.seq
        self._hear()
        for watcher in self._watchers:
            for event in watcher.observe(self.state):
                self._record(event)
        for _ in range(_ROUNDS):
            settled = self.state.seq
            self._decide()
            self._journal.check_fence()
            for event in self._hands.act(self.state):
                self._record(event)
            if self.state.seq == settled:
                break
        return self.state.seq > before

    def _hear(self) -> None:
        heard = -1
        while heard != self.state.seq:
            heard = self.state.seq
            for event in self._requests.observe(self.state):
                self._record(event)

    def close(self) -> None:
        """Let go of the journal file."""
        self._journal.close()

    def _begin(self, life: Life, last_entry: float | None) -> None:
        blind = None
        if last_entry is not None:
            sign = max(last_entry, life.last_sign or 0.0)
            blind = max(0.0, self._clock.now() - sign)
        self._record(
            DaemonStarted(
                host=life.host,
                pid=life.pid,
                version=__version__,
                policy=self._policy.version,
                blind_seconds=blind,
            )
        )

    def _decide(self) -> None:
        for _ in range(_ROUNDS):
            event = decide(self.state, self._clock.now(), self._policy)
            if event is None:
                return
            if isinstance(event, LeaveIntended):  # it may leave once all that is trained by now is saved
                for told in self._training.catch_up(self.state.attempts[event.attempt]):
                    self._record(told)
            self._record(event)

    def _record(self, event: Event) -> None:
        # Folded before it is written: an event that cannot follow must never reach the journal.
        entry = self._journal.stamp(event, self._clock.now())
        state = fold(self.state, entry)
        self._journal.append(entry)
        self.state = state


def preview(state: State, event: Event, now: float, policy: Policy) -> Sequence[Event]:
    """The events that would be journaled if `event` happened now: the same `decide`, on a copy of the state."""
    events: list[Event] = []
    coming: Event | None = event
    while coming is not None and len(events) < _ROUNDS:
        state = fold(state, Entry(seq=state.seq + 1, epoch=state.epoch, ts=now, event=coming))
        events.append(coming)
        coming = decide(state, now, policy)
    return events
