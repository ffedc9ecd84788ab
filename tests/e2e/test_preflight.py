"""A site with burn-in: nothing starts on a node before its test, and a relaunch does not wait for a test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.core.events import AttemptStarted, NodeJudged
from opt_ops.core.state.status import Status
from tests.e2e.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, "[local]\nnodes = ['n1']\n[health]\nburn_in_seconds = 60\n")
    yield site
    site.close()


def test_nodes_are_burnt_in_before_the_first_attempt_and_not_before_the_next(site: Site):
    site.start("steps=300", nodes=1, spares=0)
    site.start_daemon(LD_LIBRARY_PATH="")
    state = site.wait(lambda state: len(state.checkpoints) >= 2 and state)
    os.kill(site.pids(state.attempt.name)[0], signal.SIGKILL)
    state = site.ended()
    assert (state.status, len(state.attempts)) == (Status.COMPLETED, 2)
    told = [entry.event for entry in site.entries() if isinstance(entry.event, (NodeJudged, AttemptStarted))]
    verdicts = [event.reason for event in told if isinstance(event, NodeJudged)]
    assert verdicts[0] == "burning_in"
    assert verdicts.count("burning_in") == 1
    first = next(i for i, event in enumerate(told) if isinstance(event, AttemptStarted))
    before = [event.reason for event in told[:first]]
    assert before[0] == "burning_in"
    assert before[-1] != "burning_in"
