"""Watches the committed checkpoints: new ones are examined, those that are gone are forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from opt_ops.core.events import CheckpointRefused, CheckpointSeen, CheckpointsGone, CheckpointVerified, Event
from opt_ops.core.names import pin_holder
from opt_ops.core.state.model import State
from opt_ops.core.state.queries import has_own_good
from opt_ops.core.state.status import Status
from opt_ops.core.values import Checkpoint, Parent
from opt_ops.ports import CheckpointStore


class CheckpointWatch:
    """Follows the checkpoints of the newest run, and the snapshots of all runs."""

    def __init__(self, checkpoints: CheckpointStore) -> None:
        self._checkpoints = checkpoints
        self._refused: dict[str, int] = {}
        """By path of each checkpoint that was refused: when it was committed."""
        self._keeps_parent: bool | None = None  # None: this process has neither pinned it nor let it go

    def observe(self, state: State, reason_not_healthy: Callable[[int], str]) -> Iterator[Event]:
        """Yield what is new. `reason_not_healthy`: what the loss at a step says against its weights; empty: nothing."""
        known = state.checkpoints
        # Snapshots of earlier runs are thinned out while this run continues.
        runs = {each.checkpoint.run for each in known.values() if each.checkpoint.nodes}
        runs |= {state.run.name} if state.run else set()
        there = {each.path: each for run in sorted(runs) for each in self._checkpoints.committed(run)}
        if state.lineage is not None and (parent := state.lineage.parent) is not None:
            self._keep_parent(state, parent)
            runs |= {parent.run}
            there |= {parent.checkpoint: parent.saved} if self._checkpoints.written(parent.saved) else {}
        again = self._written_again(state, there)
        for path, checkpoint in there.items():
            if path not in known or path in again or known[path].checkpoint != checkpoint:  # or: on other nodes now
                yield CheckpointSeen(checkpoint=checkpoint)
                self._checkpoints.examine(checkpoint)
        gone = {path: of for path, each in known.items() if (of := each.checkpoint.run) in runs and path not in there}
        for run in sorted(set(gone.values())):
            yield CheckpointsGone(run=run, paths=tuple(path for path, of in gone.items() if of == run))
        for waiting in known.values():
            if waiting.verified is None:  # being examined, or seen by an earlier daemon process
                self._checkpoints.examine(waiting.checkpoint)
        for checkpoint, problem in self._checkpoints.examined():
            if checkpoint.path in gone or not (checkpoint.path in known or checkpoint.path in there):
                continue
            if problem:
                yield CheckpointRefused(checkpoint=checkpoint, why=problem)
            else:
                why = reason_not_healthy(checkpoint.step)
                yield CheckpointVerified(checkpoint=checkpoint, healthy=not why, why=why)

    def _keep_parent(self, state: State, parent: Parent) -> None:
        """Keep the checkpoint that a fork began from, until the fork has a good one of its own or needs none."""
        over = has_own_good(state) or state.status in (Status.COMPLETED, Status.CANCELLED)
        if self._keeps_parent is (not over):  # nothing has changed
            return
        holder = pin_holder(state.intent.lineage)
        if over:
            self._checkpoints.unpin(parent.saved, holder)
        else:
            self._checkpoints.pin(parent.saved, holder)
        self._keeps_parent = not over

    def _written_again(self, state: State, there: Mapping[str, Checkpoint]) -> set[str]:
        """The refused checkpoints that an attempt has written again since: a trainer replaces a damaged one."""
        again: set[str] = set()
        refused = {path for path, known in state.checkpoints.items() if known.verified is False and path in there}
        for path in refused:
            written = self._checkpoints.written(there[path])
            if self._refused.setdefault(path, written) != written:
                again.add(path)
        self._refused = {path: at for path, at in self._refused.items() if path in refused - again}
        return again
