"""The adapters' examples under the real daemon and agents: an operator's pause, and the time limit of a Slurm job.

No checkpoint is due by the count of the trainer. So what is found was asked for, and a resume from elsewhere is seen.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from tests.e2e.site import Site
from tests.slurm.conftest import slurm  # noqa: F401 (a fixture, asked for by name)
from tests.slurm.day import CONFIG, ask

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("steps=100000", "optim.total_steps=100000", "checkpoint_every=100000")
NAMES = {"pytorch_loop": "torch", "hf_trainer": "transformers", "lightning_trainer": "lightning"}
"""By example: the package without which it is skipped."""


def site_of(folder: Path, name: str, config: str = "") -> Site:
    pytest.importorskip("torch")
    pytest.importorskip(NAMES[name])
    return Site(folder, config, trainer=f"'{sys.executable}', '{EXAMPLES / name}.py'")


def settings_of(name: str) -> tuple[str, ...]:
    """Lightning's schedule is its script's own: it has no total that could be set."""
    return tuple(setting for setting in SETTINGS if name != "lightning_trainer" or "total" not in setting)


def saved_when_it_left(site: Site) -> int:
    """The step of the checkpoint that came after the attempt was asked to leave, and before it was ended."""
    events = [entry.event for entry in site.entries()]
    asked = next(i for i, event in enumerate(events) if isinstance(event, e.LeaveIntended))
    after = next(x for x in events[asked:] if isinstance(x, e.CheckpointSeen | e.StopIntended | e.AttemptEnded))
    assert isinstance(after, e.CheckpointSeen), "it was ended before it had saved"
    return after.checkpoint.step


def first_step(site: Site) -> int:
    """The first update of the newest attempt."""
    lines = (site.attempt_folder() / "telemetry.jsonl").read_text().split("\n")
    return json.loads(lines[0])["num_updates"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.soak) for name in NAMES])
def test_a_pause_saves_and_a_resume_goes_on_from_there(tmp_path: Path, name: str):
    site = site_of(tmp_path, name)
    try:
        site.start(*settings_of(name), nodes=1, spares=0, ranks=2)
        site.start_daemon()
        site.wait(lambda state: state.status is Status.TRAINING and site.step() > 5)
        site.command("run", "pause", "1", "--yes", "-q")
        paused = site.wait(lambda state: state.status is Status.PAUSED and not state.live_allocations and state)
        step = saved_when_it_left(site)
        assert paused.incidents == {}
        (ranks,) = {len(list(folder.glob("rank-*.json"))) for folder in site.runs.glob(f"1/**/step-{step:08d}")}
        assert ranks == 2

        end = paused.attempt.last_step + 40  # a fast trainer makes many updates between its save and its end
        site.command("run", "set", "1", f"steps={end}", "--yes", "--no-wait", "-q")  # so that it can end
        site.command("run", "resume", "1", "--yes", "-q")
        ended = site.ended(seconds=600)
        assert ended.status is Status.COMPLETED, ended.why
        assert (first_step(site), ended.attempt.last_step) == (step + 1, end)
        assert [incident.kind for incident in ended.incidents.values()] == ["operator"]
        assert all(incident.proven for incident in ended.incidents.values())
    finally:
        site.close()


@pytest.mark.slurm
@pytest.mark.soak
@pytest.mark.parametrize("name", list(NAMES))
def test_a_time_limit_is_met_by_a_save_and_the_next_job_goes_on_from_there(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
):
    site = site_of(tmp_path, name, CONFIG)
    request.getfixturevalue("slurm")
    try:
        site.start(*settings_of(name), nodes=1, spares=0, ranks=2)
        site.start_daemon()
        site.wait(lambda state: state.status is Status.TRAINING and site.step() > 5, seconds=600)
        cut = site.state().allocation
        minutes = 2 + int(time.time() - cut.since) // 60
        ask("scontrol", "update", f"jobid={cut.job}", f"timelimit={minutes}")
        moved = site.wait(
            lambda state: (
                state.incidents and (found := state.incidents["1-i000"]).closed_at is not None and (state, found)
            ),
            seconds=600,
        )
        state, incident = moved
        assert (incident.kind, incident.proven) == ("time_limit", True), incident
        step = saved_when_it_left(site)
        assert incident.step_resumed == step
        assert first_step(site) == step + 1
        assert str(state.allocation.job) != str(cut.job)
        assert not any(node.excluded_by for node in state.nodes.values())
        # the job left by itself before Slurm would have ended it
        assert ask("sacct", "-n", "-X", "-j", str(cut.job), "-o", "State").split()[:1] != ["TIMEOUT"]
        site.command("run", "stop", "1", "--yes", "-q")
        site.ended()
    finally:
        site.close()
