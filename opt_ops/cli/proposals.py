"""Proposals as rows: what waits for a person's answer, until when, and what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opt_ops.cli.views import newest_point
from opt_ops.core.events import RecoveryDecided
from opt_ops.core.state.model import Incident, Proposal, State
from opt_ops.core.state.queries import newest_good, open_proposals
from opt_ops.core.text import iso
from opt_ops.core.told import Tense, told
from opt_ops.core.values import Action, AskDefault


def rows(path: Path, state: State, answered: bool = False) -> list[dict[str, Any]]:
    """The proposals of a lineage, oldest first: the open ones; with `answered`, all of them."""
    every = [(incident, each) for incident in state.incidents.values() for each in incident.proposals]
    waits = {each.name for each in open_proposals(state)}
    return [_row(path, state, incident, each) for incident, each in every if answered or each.name in waits]


def then(default: AskDefault) -> str:
    """What happens when nobody has answered."""
    return "it is done" if default is AskDefault.ACT else "it is not done"


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
        "cost": cost(path, state, made.decided),
        "default": str(made.default),
        "then": then(made.default),
        "made": iso(proposal.at),
        "deadline": iso(made.deadline),
        "status": str(proposal.status),
        "by": answer.author if answer else None,
        "reason": answer.reason if answer else None,
        "at": iso(proposal.answered_at),
    }


def cost(path: Path, state: State, decided: RecoveryDecided) -> dict[str, float | int | None]:
    """The steps that would be trained again, at the present pace; None is not known."""
    attempt, point = state.attempt, newest_point(path, state.attempt)
    last = max(attempt.last_step or 0 if attempt else 0, point.step if point else 0)
    good = newest_good(state, state.run.name) if state.run else None
    begins = decided.checkpoint if decided.action is Action.ROLLBACK else good.checkpoint if good else None
    steps = 0 if decided.action is Action.REPLACE_RANKS else max(0, last - (begins.step if begins else 0))
    if point is None or attempt is None:
        return {"steps": steps, "seconds": None, "node_hours": None}
    seconds = steps * point.step_seconds
    return {"steps": steps, "seconds": round(seconds, 1), "node_hours": round(seconds * len(attempt.nodes) / 3600, 3)}
