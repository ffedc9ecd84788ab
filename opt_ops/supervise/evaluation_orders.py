"""The order for the evaluation of a checkpoint that is under way: a projection of the state, like all orders."""

from __future__ import annotations

from dataclasses import dataclass

from opt_ops.core.state.model import State
from opt_ops.ports import EvaluationOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCommand:
    """How a checkpoint is evaluated at this site."""

    argv: tuple[str, ...] = ()  # the command; checkpoint and tasks follow
    samples: tuple[str, ...] = ()  # its options for the fixed prompts
    nice: int = 0


def evaluation_order(state: State, command: EvaluationCommand) -> EvaluationOrder | None:
    """What is to run: on a node that we hold, or beside the daemon. None: nothing."""
    if (running := state.evaluation) is None:
        return None
    intended, holder = running.intended, state.held.get(running.intended.node or "")
    if intended.node is not None and holder is None:
        return None
    argv = [*command.argv, running.checkpoint]
    argv += ["--tasks", ",".join(intended.tasks)] if intended.tasks else []
    argv += command.samples if intended.samples else ()
    return EvaluationOrder(
        evaluation=running.name,
        node=intended.node,
        holder=holder.name if holder is not None else None,
        argv=(*argv, "-o", "json"),
        nice=command.nice,
    )
