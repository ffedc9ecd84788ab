"""Simulated evaluations of checkpoints: they take a while, leave their results in the inbox, or are killed before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from opt_ops.core.health import EvaluationReport
from opt_ops.laboratory.simulated.costs import Costs
from opt_ops.laboratory.simulated.timeline import Timeline
from opt_ops.ports import EvaluationOrder, Orders, Request

TASK = "sim"
_KILLED, _FAILED, _NOT_FOUND = 137, 1, 3


@dataclass(slots=True)
class SimulatedEvaluation:
    """One process that evaluates a checkpoint."""

    checkpoint: str  # such as 1.00/60
    report: EvaluationReport
    began: float
    gone: bool = False  # whether nobody waits for it any more

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.report.code is None and not self.gone


class SimulatedEvaluations:
    """All evaluations of a world, on nodes and beside the daemon."""

    def __init__(self, costs: Costs, timeline: Timeline) -> None:
        self._costs = costs
        self._timeline = timeline
        self.all: list[SimulatedEvaluation] = []
        self.beside: SimulatedEvaluation | None = None
        """That of the present daemon process."""
        self.failing = 0
        """Number of the next evaluations that fail."""
        self.ask: Callable[[Request], None]
        self.exists: Callable[[str], bool]
        """Whether there is a checkpoint of that name."""

    def begin(self, order: EvaluationOrder) -> SimulatedEvaluation:
        """Start one."""
        begun = SimulatedEvaluation(order.argv[0], EvaluationReport(name=order.evaluation), self._timeline.now)
        self.all.append(begun)
        self._timeline.after(self._costs.checkpoint_evaluation, self._end, begun)
        return begun

    def _end(self, evaluation: SimulatedEvaluation) -> None:
        if not evaluation.runs:
            return
        if self.failing > 0:
            self.failing -= 1
            self.finish(evaluation, _FAILED)
        elif not self.exists(evaluation.checkpoint):
            self.finish(evaluation, _NOT_FOUND)
        else:
            self.ask(_results(evaluation.checkpoint))
            self.finish(evaluation, 0)

    def finish(self, evaluation: SimulatedEvaluation, code: int = _KILLED) -> None:
        """It ends with this code, and its starter sees that."""
        evaluation.report = EvaluationReport(name=evaluation.report.name, code=code)
        self._timeline.disturb()

    @staticmethod
    def kill(evaluation: SimulatedEvaluation | None) -> None:
        """Its starter ends it, or dies."""
        if evaluation is not None:
            evaluation.gone = True

    def follow(
        self, present: SimulatedEvaluation | None, orders: Orders, node: str, allocation: str, busy: bool
    ) -> SimulatedEvaluation | None:
        """What an agent does: it starts what is ordered, unless anything else needs the node."""
        order, launch = orders.evaluate, orders.launch
        busy = busy or allocation in orders.released
        busy = busy or (launch is not None and launch.holders.get(node) == allocation)
        mine = order is not None and (order.node, order.holder) == (node, allocation)
        return self.only(present, order if mine and not busy else None)

    def only(self, present: SimulatedEvaluation | None, order: EvaluationOrder | None) -> SimulatedEvaluation | None:
        """End what is not ordered, and start what is, once."""
        if present is not None and (order is None or order.evaluation != present.report.name):
            self.kill(present)
            present = None
        return self.begin(order) if order is not None and present is None else present


def _results(checkpoint: str) -> Request:
    """The request that `ckpt evaluate` leaves: for the same checkpoint always the same one."""
    run, _, step = checkpoint.partition("/")
    digest = hashlib.sha256(checkpoint.encode()).hexdigest()
    arguments = {
        "run": run,
        "step": int(step),
        "digest": digest,
        "task": TASK,
        "metric": "acc",
        "value": 0.5,
        "n": 100,
        "shots": 0,
        "harness": "simulated 1",
        "task_version": "1",
        "file": f"evaluations/step-{int(step):08d}/results.json",
        "sha256": digest,
    }
    return Request(request=f"evaluated-{digest[:32]}", author="opt-ops", verb="evaluated", arguments=arguments)
