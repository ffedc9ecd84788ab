"""Watches open proposals: pins the checkpoints that they need, and sees their deadlines although the clock is set back.

A deadline is a moment of the wall clock, and `decide` compares it with the clock. Here the time that has passed is
counted too, by a clock that nobody sets. So a deadline may come earlier, and not later. Only a daemon process that
starts after the clock was set back cannot know how much time has passed: then it may come later, by at most that time.
"""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.core.decide.asking import expired
from opt_ops.core.events import Event
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import open_proposals
from opt_ops.ports import CheckpointStore, Clock


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
        now = self._clock.monotonic()
        for proposal in open_proposals(state):
            if proposal.name not in self._due:
                left = proposal.made.deadline - max(self._clock.now(), self._watched_until)
                self._due[proposal.name] = now + left
                if (checkpoint := proposal.made.decided.checkpoint) is not None:
                    self._checkpoints.pin(checkpoint)  # training goes on, and prunes old checkpoints
            if now >= self._due[proposal.name]:
                yield expired(state, proposal)
