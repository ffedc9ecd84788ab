"""How sure an incident's cause is: by what the finding rests on, not by how often it was right.

Words as people use them: *certain*, it was put in, or asked for; *high*, who says so saw it happen; *medium*, it
follows by a rule that can err; *low*, what happened is known, why is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BY_KIND: Mapping[str, tuple[str, str]] = {
    "bad_gpu": ("high", "the driver or the kernel says so"),
    "user_error": ("high", "the trainer refused its own settings"),
    "checkpoint_refused": ("high", "its bytes do not agree with its manifest"),
    "out_of_memory": ("high", "the process said so as it ended"),
    "storage": ("high", "the process said so as it ended"),
    "time_limit": ("high", "the scheduler says so"),
    "preemption": ("high", "the scheduler says so"),
    "job_cancelled": ("high", "the scheduler says so"),
    "allocation_lost": ("medium", "the scheduler says that the job ended, not always why"),
    "nodes_returned": ("high", "the nodes report"),
    "daemon_restart": ("high", "the journal shows the gap"),
    "straggler": ("medium", "one rank was slower than all others; why is not known"),
    "silent_node": ("medium", "its agent fell silent and no step came; the network may be at fault"),
    "communication": ("low", "ranks lost a peer: the first to say so need not be the culprit"),
    "loss_scale_floor": ("low", "the scale is at its floor; what made gradients overflow is not known"),
    "loss_spike": ("low", "the curve left its band; whether data, learning rate or hardware did it is not known"),
    "loss_drift": ("low", "the curve drifted; whether data, learning rate or hardware did it is not known"),
    "non_finite_loss": ("low", "a value was not finite; where it arose is not known"),
}


def confidence(row: Mapping[str, Any]) -> tuple[str, str]:
    """The word, and what it rests on."""
    if row["drill"]:
        return "certain", "it was put in on purpose"
    if row["kind"] == "operator":
        return "certain", "a person asked for it"
    if row["kind"] == "hang":
        stacks = row["stacks"] or {}
        if stacks.get("odd"):
            return "medium", "the stacks show which ranks the others waited for"
        return "low", "no step came, and no rank stands out"
    if row["kind"] == "process_death":
        if row["evidence"].get("line"):
            return "medium", "the first rank to fall said this as it ended; what led to it may lie elsewhere"
        return "low", "the first rank to fall is known, why it fell is not"
    return _BY_KIND.get(row["kind"], ("low", "no rule says more"))
