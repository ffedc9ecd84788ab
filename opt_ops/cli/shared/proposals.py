"""Proposals as rows: what waits for a person's answer, until when, and what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opt_ops.cli.shared.views import loss, newest_good_step, newest_step
from opt_ops.core.events import RecoveryDecided
from opt_ops.core.state.model import Incident, Proposal, State
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.text import iso
from opt_ops.core.told import Tense, told
from opt_ops.core.values import Action, AskDefault


def rows(path: Path, state: State, answered: bool = False) -> list[dict[str, Any]]:
    """The proposals of a lineage, oldest first: the open ones; with `answered`, all of them."""
    every = [(incident, each) for incident in state.incidents.values() for each in incident.proposals]
    waits = {each.name for each in open_proposals(state)}
    return [_row(path, state, incident, each) for incident, each in every if answered or each.name in waits]


def _row(path: Path, state: State, incident: Incident, proposal: Proposal) -> dict[str, Any]:
    made, answer = proposal.made, proposal.answer
    return {
        "proposal": proposal.name,
        "incident": incident.name,
        "action": str(made.decided.action),
        "text": told(made.decided, state, Tense.WOULD),
        "why": made.decided.why,
        "evidence": [
            incident.cause,
            incident.detector,
            *(each for c in incident.causes[:1] for each in c.evidence_for),
        ],
        "cost": _cost(path, state, made.decided),
        "default": str(made.default),
        "then": "it is done" if made.default is AskDefault.ACT else "it is not done",
        "made": iso(proposal.at),
        "deadline": iso(made.deadline),
        "status": str(proposal.status),
        "by": answer.author if answer else None,
        "reason": answer.reason if answer else None,
        "at": iso(proposal.answered_at),
    }


def _cost(path: Path, state: State, decided: RecoveryDecided) -> dict[str, float | int | None]:
    """The steps that would be trained again, at the present pace; None is not known."""
    begins = newest_good_step(state)
    if decided.action is Action.ROLLBACK:
        begins = decided.checkpoint.step if decided.checkpoint else 0
    steps = 0 if decided.action is Action.REPLACE_RANKS else max(0, (newest_step(path, state) or 0) - (begins or 0))
    row = loss(path, state, steps).row()
    return {name: row[name] for name in ("steps", "seconds", "node_hours")}
