"""Watches open proposals: pins the checkpoints that they need, and sees their deadlines although the clock is set back.

A deadline is a moment of the wall clock, and `decide` compares it with the clock. Here the time that has passed is
counted too, by the monotonic clock. It counts from the host's boot, and the journal has the deadline by it. So a
deadline may come earlier, and not later; in later daemon processes of that host as well. After a reboot, or on another
host, a clock that stands before the last sign of the earlier daemon was set back: then the deadline comes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from opt_ops.core.decide.asking import expired
from opt_ops.core.events import Event, ProposalMade
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.waiting import SKEW_SECONDS
from opt_ops.ports import CheckpointStore, Clock


def with_due(made: ProposalMade, clock: Clock) -> ProposalMade:
    """Add the deadline by the monotonic clock, for daemon processes that start after the clock was set back."""
    return replace(made, boot=clock.boot(), due=clock.monotonic() + made.deadline - clock.now())


class ProposalWatch:
    """Follows the proposals that wait for an answer."""

    def __init__(self, checkpoints: CheckpointStore, clock: Clock, watched_until: float) -> None:
        """`watched_until`: the time of the last sign of an earlier daemon process. It is not before that."""
        self._checkpoints = checkpoints
        self._clock = clock
        self._watched_until = watched_until
        self._due: dict[str, float] = {}
        """Monotonic seconds of the deadlines, by proposal."""

    def observe(self, state: State) -> Iterator[Event]:
        """Yield the ends of proposals whose time has passed, whatever the clock says."""
        for proposal in open_proposals(state):
            if proposal.name not in self._due:
                self._due[proposal.name] = self._due_of(proposal.made)
                if (checkpoint := proposal.made.decided.checkpoint) is not None:
                    self._checkpoints.pin(checkpoint)  # training goes on, and prunes old checkpoints
            if self._clock.monotonic() >= self._due[proposal.name]:
                yield expired(state, proposal)

    def _due_of(self, made: ProposalMade) -> float:
        now, monotonic = self._clock.now(), self._clock.monotonic()
        due = monotonic + made.deadline - max(now, self._watched_until)
        if made.due is not None and made.boot and made.boot == self._clock.boot():
            return min(due, made.due)
        return monotonic if now < self._watched_until - SKEW_SECONDS else due
