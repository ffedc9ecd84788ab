"""Watches the evaluation of a checkpoint that runs: keeps its checkpoint, and sees its end."""

from __future__ import annotations

from collections.abc import Iterator

from opt_ops.contract.exit_codes import EVALUATION_HANGS, EVALUATION_NOT_STARTED
from opt_ops.core.events import CheckpointsGone, EvaluationEnded, Event
from opt_ops.core.state.checkpoints import Evaluation
from opt_ops.core.state.model import State
from opt_ops.core.values import EvaluationEnd
from opt_ops.ports import CheckpointStore, Evaluations
from opt_ops.supervise.watch_nodes import NodeWatch

_CODES = {
    3: "the checkpoint or a task is not there",
    65: "the checkpoint is damaged",
    75: "its environment is missing, or the daemon did not answer",
    EVALUATION_HANGS: "it had not ended after a day",
    EVALUATION_NOT_STARTED: "it could not be started, and the log of the daemon or of the node says why",
}


class EvaluationWatch:
    """Follows the evaluation that is under way, on a node or beside the daemon."""

    def __init__(self, nodes: NodeWatch, evaluations: Evaluations, checkpoints: CheckpointStore) -> None:
        self._nodes = nodes
        self._evaluations = evaluations
        self._checkpoints = checkpoints
        self._looked_at: Evaluation | None = None

    def observe(self, state: State) -> Iterator[Event]:
        """Yield the end of the evaluation."""
        running = state.evaluation
        self._keep(state)
        codes = dict(self._evaluations.ended())
        if running is None:
            return
        if running.intended.node is not None:
            report = self._nodes.evaluation(running.intended.node)
            codes = {report.name: report.code} if report is not None and report.code is not None else {}
        if (code := codes.get(running.name)) is not None:
            yield from self._ended(running, code)

    def _keep(self, state: State) -> None:
        """Keep the checkpoint of the newest evaluation from being pruned until that has ended.

        The one before may have been pinned by a daemon process that has died since.
        """
        recent = list(state.evaluations.values())[-2:]
        if not recent or recent[-1] is self._looked_at:
            return
        for each in recent:
            (self._checkpoints.pin if each.end is None else self._checkpoints.unpin)(
                each.intended.checkpoint, each.name
            )
        self._looked_at = recent[-1]

    def _ended(self, running: Evaluation, code: int) -> Iterator[Event]:
        checkpoint = running.intended.checkpoint
        self._checkpoints.unpin(checkpoint, running.name)  # now: a lineage that is finished is not looked at again
        if code == 0:
            yield EvaluationEnded(evaluation=running.name, end=EvaluationEnd.DONE)
        elif not self._checkpoints.written(checkpoint):
            yield CheckpointsGone(run=checkpoint.run, paths=(checkpoint.path,))
            yield EvaluationEnded(evaluation=running.name, end=EvaluationEnd.GIVEN_UP, why="its checkpoint is gone")
        else:
            said = f"exit code {code}, {_CODES[code]}" if code in _CODES else f"exit code {code}"
            why = said if code == EVALUATION_NOT_STARTED else f"{said}; its output is in evaluations/{running.name}.log"
            yield EvaluationEnded(evaluation=running.name, end=EvaluationEnd.FAILED, why=why)
