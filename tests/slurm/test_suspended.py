"""A job that is suspended and resumed: the attempt stands still, and goes on."""

from __future__ import annotations

import pytest

from tests.e2e.site import Site
from tests.slurm.day import Day, ask

pytestmark = pytest.mark.slurm


def test_a_suspended_job_is_held_and_its_attempt_goes_on_when_it_is_resumed(site: Site):
    day = Day(site)
    attempt, job = day.attempt, str(day.state.live_allocations[0].job)
    ask("scontrol", "suspend", job)
    site.wait(lambda state: state.live_allocations[0].suspended)
    assert "suspended" in site.command("q")
    site.looked(seconds=20.0)  # longer than the site's patience with a hang or a silent node
    step = site.step()
    ask("scontrol", "resume", job)
    site.wait(lambda state: not state.live_allocations[0].suspended)
    day.trained(20)
    assert site.step() > step
    assert day.attempt == attempt
    day.ends(submitted=1)
