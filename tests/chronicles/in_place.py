"""A lineage whose ranks are lost three times: replaced by a spare, in part by nobody, and on their own node.

python -m tests.chronicles.in_place FOLDER    # tells it in FOLDER/12 and draws its chronicle, to be looked at
"""

from __future__ import annotations

import sys
from pathlib import Path

from chronicles.logbook.render import render
from opt_ops.contract.replacing import CAPABILITY
from opt_ops.core import events as e
from opt_ops.core.values import Outcome
from tests.chronicles.eventful import Lived


def replaced(folder: Path) -> Lived:
    """Four nodes of two ranks train, and a spare with two warm ranks takes the place of a node."""
    told = Lived(folder, steps=1000, step_seconds=4.0)
    told.capabilities = (CAPABILITY,)
    told.begins()
    told.granted("4101", "n1", "n2", "n3", "n4", "n5")
    told.runs(120)
    told.saves(100)
    told.see(e.StandbySeen(node="n5", ready=2))
    told.dies(3)
    told.joins(kept=6)
    return told


def lost_ranks(folder: Path) -> Lived:
    """All three."""
    told = replaced(folder)
    told.runs(220)
    told.saves(200)
    told.see(e.StandbySeen(node="n5", ready=0))
    told.dies(0)  # nobody is ready
    told.end("12.00-a0", Outcome.STOPPED, 220)
    told.runs(320)
    told.saves(300)
    told.see(e.StandbySeen(node="n4", ready=1))
    told.dies(7)
    attempt = told.state.attempt
    assert attempt is not None
    failed = e.SignalRaised(
        signal="process_death",
        tier=next(iter(told.state.signals.values())).tier,
        attempt=attempt.name,
        step=320,
        onset_step=None,
        at=told.now,
        rule="ranks ended with 88",
        evidence={"rank": 3, "lost_ranks": [2, 3], "codes": [88]},
        generation=attempt.generation,
    )
    told.see(failed)
    told.end(attempt.name, Outcome.STOPPED, 320)
    told.runs(420)
    told.saves(400)
    return told


if __name__ == "__main__":
    target = Path(sys.argv[1]) / "12"
    lost_ranks(target)
    print(*render(target), sep="\n")
