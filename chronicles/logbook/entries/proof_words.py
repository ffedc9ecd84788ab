"""The proof of an incident in words: what was read back, and what it leaves open."""

from __future__ import annotations

from collections.abc import Iterator

from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport
from chronicles.wording import full, rate, short, whole
from opt_ops.core.state.status import Status


def how_ended(record: LineageRecord) -> str:
    """How a lineage ended before an incident of it was over. Nothing more will be known of that incident."""
    ways = {Status.COMPLETED: "completed", Status.HALTED: "halted", Status.CANCELLED: "stopped"}
    return ways[record.state.status]


def ended_before(record: LineageRecord) -> str:
    """Why an incident has no proof: `Stopped by ann before it was proven.` and nothing more will be known."""
    stop = record.state.stop
    by = f" by {short(stop.author, 40)}" if stop is not None and record.state.status is Status.CANCELLED else ""
    return f"{how_ended(record).capitalize()}{by} before it was proven."


def _proof_in_place(row: IncidentReport) -> Iterator[str]:
    """That the others stayed, and where they went on."""
    if not row.in_place:
        return
    if row.pids_kept:
        yield "All other processes are the same as before (process id and start time)."
    else:
        yield "It is not known whether all other processes are the same as before."
    if row.step_resumed is not None:
        yield f"Telemetry goes on with step {whole(row.step_resumed + 1)}, and has each of the first steps once."


def proof_of(record: LineageRecord, row: IncidentReport) -> str:
    """What shows that the action took effect."""
    proof, first = row.proof, row.telling
    if row.closed is None:
        return ended_before(record) if record.state.ended else "Not known yet."
    if row.proven is None:
        return "Nothing to prove: an operator has decided since."
    if mismatch := proof.get("mismatch"):
        return full(f"NOT PROVEN. {mismatch}")
    if first is not None:
        expected = "."
        if first.due_lr is not None:
            expected = f"; {rate(first.due_lr)} was expected. Both agree up to step {whole(row.readbacks[-1].step)}."
        return " ".join(
            (
                *_proof_in_place(row),
                f"At step {whole(first.step)} the live optimizer used the learning rate {rate(first.lr)}{expected}",
                f"Betas, weight decay and clipping are {'as requested' if row.settings else 'unchanged'}.",
                *([row.limit_of_proof] if row.limit_of_proof else []),
            )
        )
    if "excluded" in proof:
        states = [f"{name}: drain {state}" for name, state in proof.get("drain", {}).items()]
        return f"No attempt starts there any more; {', '.join(states)}."
    if "seen_by_epoch" in proof:
        return f"The next daemon process saw attempt {proof['attempt']} at step {whole(proof['step'])}."
    return "The last step was trained before a proof was needed."
