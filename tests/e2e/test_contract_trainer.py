"""The example of docs/contract.md, a trainer that knows the contract only, under the real daemon and agents."""

import os
import signal
import sys
from pathlib import Path

import pytest

from opt_ops.core.state.status import Status
from tests.e2e.site import Site

EXAMPLE = Path(__file__).parents[2] / "examples" / "contract_trainer.py"


def test_it_survives_a_killed_rank_a_nan_and_a_pause(tmp_path: Path):
    pytest.importorskip("torch", reason="two ranks need torch's gloo")
    site = Site(tmp_path, trainer=f"'{sys.executable}', '{EXAMPLE}'")
    try:
        site.start("steps=100000", "checkpoint_every=100", nodes=1, spares=0, ranks=2)
        site.start_daemon()
        site.wait(lambda state: state.checkpoints)

        os.kill(site.pids("1.00-a0")[1], signal.SIGKILL)
        again = site.wait(lambda state: state.incidents and state.incidents["1-i000"].closed_at and state)
        assert (again.incidents["1-i000"].kind, again.incidents["1-i000"].proven) == ("process_death", True)

        site.command("drill", "nan", "1", "--yes", "-q")
        healed = site.wait(lambda state: len(state.incidents) == 2 and state.incidents["1-i001"].closed_at and state)
        incident = healed.incidents["1-i001"]
        assert (incident.kind, incident.drill, incident.proven) == ("non_finite_loss", "d000", True)

        before = site.step()
        site.command("run", "pause", "1", "--yes", "-q")
        paused = site.wait(lambda state: state.status is Status.PAUSED and not state.live_allocations and state)
        site.command("run", "resume", "1", "--yes", "-q")
        resumed = site.wait(lambda state: state.status is Status.TRAINING and state.attempt.first_step and state)
        assert resumed.attempt.first_step > before, "both ranks saved at one step before they ended"
        assert resumed.attempt.first_step <= paused.attempt.last_step + 1
    finally:
        site.close()
